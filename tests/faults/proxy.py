"""A proxy between a mirror and its target, for what a network does to a connection."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from pathlib import Path
from typing import Self

LISTEN_POLL_S = 0.02
JOIN_S_MAX = 5.0


class Proxy:
    """Listens on a TCP port of 127.0.0.1 and forwards to `target`, a Unix socket or a TCP address.

    `stall`: from now on nothing passes, and nobody is told. `forward` takes that back. `reset`:
    each connection ends with a RST. `half_close`: the client sees an end of file, and may still
    send, to nobody. `reset_after`: a RST once so many bytes more went to the target. New
    connections are forwarded, or stall as well.
    """

    def __init__(self, target: Path | tuple[str, int]) -> None:
        self._target = target
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._is_stalled = False
        self._bytes_left: int | None = None
        self._is_stopping = False
        self._lock = threading.Lock()  # guards all of the above
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
            for pair in list(self._pairs):
                self._reset(pair)

    def reset_after(self, bytes_left: int) -> None:
        with self._lock:
            self._bytes_left = bytes_left

    def half_close(self) -> None:
        with self._lock:
            for near, far in self._pairs:
                near.shutdown(socket.SHUT_WR)
                far.shutdown(socket.SHUT_RDWR)

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
                watched = [] if self._is_stalled else [one for pair in self._pairs for one in pair]
            readable = select.select([self._listener, *watched], [], [], LISTEN_POLL_S)[0]
            if self._listener in readable:
                self._accept()
            with self._lock:
                for near, far in list(self._pairs):
                    for here, there in ((near, far), (far, near)):
                        if here in readable and not self._is_stalled:
                            self._pass((near, far), here, there)

    def _accept(self) -> None:
        near = self._listener.accept()[0]
        is_path = isinstance(self._target, Path)
        far = socket.socket(socket.AF_UNIX if is_path else socket.AF_INET)
        try:
            far.connect(str(self._target) if is_path else self._target)
        except OSError:
            near.close()
            far.close()
            return
        with self._lock:
            self._pairs.append((near, far))
            self.connections += 1

    def _pass(
        self, pair: tuple[socket.socket, socket.socket], here: socket.socket, there: socket.socket
    ) -> None:
        if pair not in self._pairs:
            return
        length_max = 1 << 16
        to_target = there is pair[1]
        if to_target and self._bytes_left is not None:
            length_max = min(length_max, self._bytes_left)
            if not length_max:
                self._bytes_left = None
                self._reset(pair)
                return
        try:
            data = here.recv(length_max)
            if data:
                there.sendall(data)
        except OSError:
            data = b""
        if not data:
            self._drop(pair)
        elif to_target and self._bytes_left is not None:
            self._bytes_left -= len(data)

    def _reset(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with contextlib.suppress(OSError):  # it is gone
            pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._drop(pair)

    def _drop(self, pair: tuple[socket.socket, socket.socket]) -> None:
        self._pairs.remove(pair)
        for one in pair:
            one.close()
