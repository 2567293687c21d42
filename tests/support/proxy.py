"""A proxy between a mirror and its target, for what a network does to a connection."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

LISTEN_POLL_S = 0.02
JOIN_S_MAX = 5.0
REQUEST_MAGIC = bytes.fromhex("25609513")
"""Begins each request of NBD's, which come after the handshake."""

HELD_BYTES_MAX = 1 << 20
"""On their way, in each direction of a connection."""


@dataclass(eq=False)
class _End:
    """One of a connection's two sockets, and what it is still to be sent."""

    socket: socket.socket
    is_target: bool
    held: bytearray = field(default_factory=bytearray)
    sent: bytes = b""
    """The last part, and the end of what was sent before; to find what is in two parts."""
    has_requests: bool = False
    """Was sent requests: the handshake is over."""

    def fileno(self) -> int:
        return self.socket.fileno()


class Proxy:
    """Listens on a TCP port of 127.0.0.1 and forwards to `target`, a Unix socket or a TCP address.

    `stall`: from now on nothing passes, and nobody is told. `forward` takes that back. `reset`:
    each connection ends with a RST, and what was on its way is gone. `half_close`: the client sees
    an end of file, and may still send, to nobody. `reset_after`: a RST once so many bytes more went
    to the target. `spare`: a `reset` leaves the connection alone that is first to send these bytes
    from now on, also in two parts. New connections are forwarded, or stall as well.
    """

    def __init__(self, target: Path | tuple[str, int]) -> None:
        self._target = target
        self._pairs: list[tuple[_End, _End]] = []
        self._is_stalled = False
        self._bytes_left: int | None = None
        self._spared_bytes: bytes | None = None
        self._spared: tuple[_End, _End] | None = None
        self._is_stopping = False
        self._lock = threading.Lock()  # guards all of the above; nobody waits while holding it
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        return f"nbd://127.0.0.1:{self.port}"

    def stall(self) -> None:
        with self._lock:
            self._is_stalled = True

    def forward(self) -> None:
        with self._lock:
            self._is_stalled = False

    def reset(self) -> None:
        with self._lock:
            for pair in [pair for pair in self._pairs if pair is not self._spared]:
                self._reset(pair)

    def spare(self, content: bytes) -> None:
        with self._lock:
            self._spared_bytes, self._spared = content, None

    @property
    def connections_at_work(self) -> int:
        """Those that are there, and past their handshake."""
        with self._lock:
            return sum(target.has_requests for _, target in self._pairs)

    @property
    def has_spared(self) -> bool:
        """They were sent on, as far as the target takes anything."""
        return self._spared is not None and not self._spared[1].held

    def reset_after(self, bytes_left: int) -> None:
        with self._lock:
            self._bytes_left = bytes_left

    def half_close(self) -> None:
        with self._lock:
            for near, far in self._pairs:
                with contextlib.suppress(OSError):  # closed at that moment
                    near.socket.shutdown(socket.SHUT_WR)
                    far.socket.shutdown(socket.SHUT_RDWR)
                near.held.clear()

    def close(self) -> None:
        self._is_stopping = True
        self._thread.join(JOIN_S_MAX)
        assert not self._thread.is_alive(), "the proxy does not end"
        self._listener.close()
        for pair in list(self._pairs):
            self._drop(pair)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._is_stopping:
            with self._lock:
                pairs = [] if self._is_stalled else list(self._pairs)
            ends = [end for pair in pairs for end in pair]
            # Who is owed much is not read for: that would be to wait for the other side.
            sources = [a for pair in pairs for a, b in (pair, pair[::-1]) if not _is_full(b)]
            sinks = [end for end in ends if end.held]
            try:
                read_from: list[socket.socket | _End] = [self._listener, *sources]
                readable, writable, _ = select.select(read_from, sinks, [], LISTEN_POLL_S)
            except (OSError, ValueError):
                continue  # one of them was reset meanwhile
            if self._listener in readable:
                self._accept()
            with self._lock:
                for pair in list(self._pairs) if not self._is_stalled else []:
                    for here, there in (pair, pair[::-1]):
                        if here in readable and pair in self._pairs:
                            self._take(pair, here, there)
                        if here in writable and pair in self._pairs:
                            self._give(pair, here)

    def _accept(self) -> None:
        near = self._listener.accept()[0]
        address = self._target if isinstance(self._target, tuple) else str(self._target)
        is_inet = isinstance(address, tuple)
        far = socket.socket(socket.AF_INET if is_inet else socket.AF_UNIX)
        try:
            far.connect(address)
        except OSError:
            near.close()
            far.close()
            return
        for one in (near, far):
            one.setblocking(False)
            if one.family == socket.AF_INET:  # as libnbd and NBD servers: small ones do not wait
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._pairs.append((_End(near, is_target=False), _End(far, is_target=True)))
            self.connections += 1

    def _take(self, pair: tuple[_End, _End], here: _End, there: _End) -> None:
        try:
            data = here.socket.recv(HELD_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(pair)
        else:
            if there.is_target and self._spared_bytes is not None and self._spared is None:
                there.sent = there.sent[1 - len(self._spared_bytes) :] + data
                if self._spared_bytes in there.sent:
                    self._spared = pair
            there.has_requests |= there.is_target and REQUEST_MAGIC in data
            there.held += data
            self._give(pair, there)

    def _give(self, pair: tuple[_End, _End], end: _End) -> None:
        is_counted = end.is_target and self._bytes_left is not None
        length_max = len(end.held)
        if is_counted:
            assert self._bytes_left is not None
            length_max = min(length_max, self._bytes_left)
            if not length_max:
                self._bytes_left = None
                self._reset(pair)
                return
        try:
            sent = end.socket.send(memoryview(end.held)[:length_max])
        except BlockingIOError:
            return
        except OSError:
            self._drop(pair)
            return
        del end.held[:sent]
        if is_counted:
            assert self._bytes_left is not None
            self._bytes_left -= sent

    def _reset(self, pair: tuple[_End, _End]) -> None:
        with contextlib.suppress(OSError):  # it is gone
            linger = struct.pack("ii", 1, 0)
            pair[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._drop(pair)

    def _drop(self, pair: tuple[_End, _End]) -> None:
        self._pairs.remove(pair)
        for one in pair:
            one.socket.close()


def _is_full(end: _End) -> bool:
    return len(end.held) >= HELD_BYTES_MAX
