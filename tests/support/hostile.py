"""An NBD server that does what no real one does.

With no trick set it is a plain, correct server of an image in memory (nbdcopy, nbdinfo and whole
mirrors say so in test_hostile_target.py). A trick (tricks.py) replaces one answer: in the greeting,
to an option, or to a request. Everything can be changed while it runs.

    with Hostile(folder, bytes(MiB)) as target:
        target.on_request[READ] = wrong_handle
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST_MAGIC, SIMPLE_MAGIC, CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = (
    1,
    2,
    3,
    5,
    6,
    7,
    8,
    9,
    10,
)
ACK, REP_SERVER, REP_INFO, REP_META, UNSUPPORTED = 1, 2, 3, 4, 0x80000001
READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, ZERO, STATUS = 0, 1, 2, 3, 4, 5, 6, 7
NONE, DATA, HOLE, EXTENTS, ERROR, ERROR_AT = 0, 1, 2, 5, 0x8001, 0x8002
DONE = 1
HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_ZERO = 1, 4, 8, 32, 64
MULTI_CONN, SEND_CACHE = 256, 1024
FLAGS = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_ZERO | MULTI_CONN | SEND_CACHE
EIO, EINVAL, ENOSPC = 5, 22, 28

SOCKET_S_MAX = 30.0
DRIP_PAUSE_S = 0.3
FLOOD_BYTES = 1 << 16


class HangUp(Exception):
    """Close this connection now."""


@dataclass(frozen=True, slots=True)
class Request:
    flags: int
    kind: int
    handle: int
    offset: int
    length: int
    payload: bytes = b""


Trick = Callable[["Talk", Request], bytes | None]
"""What is sent in place of the answer to a request; None for the right answer."""

OptionTrick = Callable[["Talk", int], bytes | None]


class Hostile:
    """The server, on a Unix socket. `image` is what it serves and what was written to it."""

    name = "hostile"

    def __init__(self, folder: Path, image: bytes) -> None:
        self.image = bytearray(image)
        self.size = len(image)
        """What is announced, as 64 bits."""
        self.block_sizes: tuple[int, int, int] | None = (1, 4096, 32 << 20)
        self.right_flags = self.flags = FLAGS
        self.structured = True
        self.greeting: bytes | None = None
        self.on_option: dict[int, OptionTrick] = {}
        self.on_request: dict[int, Trick] = {}
        self.after = 0
        """Requests that are answered as they should be before the tricks begin."""
        self.close_after: int | None = None
        """Bytes sent on a connection, after which it is closed."""
        self.at_start: bytes = b""
        """Sent when the handshake is over, before anything is asked for."""
        self.connections = 0
        self.requests: list[Request] = []
        self.socket = folder / f"{self.name}.sock"
        self._stopping = threading.Event()
        self._talks: set[Talk] = set()
        self._listener = socket.socket(socket.AF_UNIX)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def behave(self) -> None:
        """No tricks any more, for connections that are open as well."""
        self.on_option, self.on_request = {}, {}
        self.greeting, self.close_after, self.at_start = None, None, b""
        self.size, self.block_sizes, self.flags = (
            len(self.image),
            (1, 4096, 32 << 20),
            self.right_flags,
        )

    def hang_up(self) -> None:
        for talk in list(self._talks):
            talk.close()

    def __enter__(self) -> Self:
        self._listener.bind(str(self.socket))
        self._listener.listen(64)
        threading.Thread(target=self._accept, name="hostile", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.socket.unlink(missing_ok=True)
        self.hang_up()

    def wait(self, seconds: float) -> bool:
        """True when the server is to end."""
        return self._stopping.wait(seconds)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                talk = Talk(self, self._listener.accept()[0])
                self.connections += 1
                self._talks.add(talk)
                threading.Thread(target=self._talk, args=(talk,), daemon=True).start()

    def _talk(self, talk: Talk) -> None:
        with contextlib.suppress(OSError, HangUp):
            talk.run()
        talk.close()
        self._talks.discard(talk)


class Talk:
    """One connection."""

    def __init__(self, server: Hostile, sock: socket.socket) -> None:
        self.server = server
        self._socket = sock
        self._sent = 0
        self._lock = threading.Lock()
        self.structured = False
        self.contexts: list[int] = []

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def send(self, data: bytes) -> None:
        left = self.server.close_after
        if left is not None:
            data = data[: max(0, left - self._sent)]
        self._socket.sendall(data)
        self._sent += len(data)
        if left is not None and self._sent >= left:
            raise HangUp

    def drip(self, data: bytes) -> None:
        """A byte now and then."""
        for byte in data:
            self.send(bytes((byte,)))
            if self.server.wait(DRIP_PAUSE_S):
                raise HangUp

    def flood(self, data: bytes) -> None:
        """The same again and again, as fast as it is taken, until the other end has had enough."""
        many = data * max(1, FLOOD_BYTES // len(data))
        while not self.server.wait(0):
            self.send(many)
        raise HangUp

    def silence(self) -> None:
        """Say nothing more, and take nothing."""
        self.server.wait(3600)
        raise HangUp

    def receive(self, length: int) -> bytes:
        parts, left = [], length
        while left:
            part = self._socket.recv(min(left, 1 << 20))
            if not part:
                raise HangUp
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def run(self) -> None:
        server = self.server
        self.send(server.greeting or struct.pack(">QQH", MAGIC, OPTION_MAGIC, 3))
        no_zeroes = bool(struct.unpack(">I", self.receive(4))[0] & 2)
        while True:
            magic, option, length = struct.unpack(">QII", self.receive(16))
            if magic != OPTION_MAGIC:
                raise HangUp  # a client that takes the handshake for over
            data = self.receive(length)
            trick = server.on_option.get(option)
            answer = trick(self, option) if trick else None
            is_right = answer is None
            if answer is None:
                answer = self.answer_option(option, data, no_zeroes)
            self.send(answer)
            if option == ABORT:
                return
            if option in (GO, EXPORT_NAME) and is_right:
                break
        if server.at_start:
            self.send(server.at_start)
        for number in itertools.count():
            self._serve(number)

    def _serve(self, number: int) -> None:
        server = self.server
        magic, flags, kind, handle, offset, length = struct.unpack(">IHHQQI", self.receive(28))
        if magic != REQUEST_MAGIC:
            raise HangUp
        payload = self.receive(length) if kind == WRITE else b""
        request = Request(flags, kind, handle, offset, length, payload)
        server.requests.append(request)
        if kind == DISCONNECT:
            raise HangUp
        trick = server.on_request.get(kind)
        answer = trick(self, request) if trick and number >= server.after else None
        self.send(self.answer(request) if answer is None else answer)

    # The right answers.

    def answer_option(self, option: int, data: bytes, no_zeroes: bool) -> bytes:
        server = self.server
        if option == EXPORT_NAME:
            zeroes = b"" if no_zeroes else bytes(124)
            return struct.pack(">QH", server.size, server.flags) + zeroes
        if option == STRUCTURED and server.structured:
            self.structured = True
            return option_reply(option, ACK)
        if option in (ABORT,):
            return option_reply(option, ACK)
        if option == LIST:
            return option_reply(option, REP_SERVER, struct.pack(">I", 0)) + option_reply(
                option, ACK
            )
        if option in (INFO, GO):
            return self._info(option, data)
        if option in (LIST_META, SET_META) and self.structured:
            return self._contexts(option, data)
        return option_reply(option, UNSUPPORTED)

    def _info(self, option: int, data: bytes) -> bytes:
        server = self.server
        (length,) = struct.unpack(">I", data[:4])
        count = struct.unpack(">H", data[4 + length : 6 + length])[0]
        wanted = struct.unpack(f">{count}H", data[6 + length :])
        found = option_reply(option, REP_INFO, struct.pack(">HQH", 0, server.size, server.flags))
        if 3 in wanted and server.block_sizes is not None:
            sizes = struct.pack(">HIII", 3, *server.block_sizes)
            found += option_reply(option, REP_INFO, sizes)
        return found + option_reply(option, ACK)

    def _contexts(self, option: int, data: bytes) -> bytes:
        is_asked_for = b"base:allocation" in data
        self.contexts = [1] if is_asked_for else []
        name = struct.pack(">I", 1) + b"base:allocation"
        found = option_reply(option, REP_META, name) if is_asked_for else b""
        return found + option_reply(option, ACK)

    def answer(self, request: Request) -> bytes:
        """Do it, and say so."""
        image, start = self.server.image, request.offset
        end = start + request.length
        if request.kind not in (FLUSH,) and end > len(image):
            return self.error(request, EINVAL)
        if request.kind == READ:
            return self.data(request, bytes(image[start:end]))
        if request.kind == WRITE:
            image[start:end] = request.payload
        elif request.kind in (ZERO, TRIM):
            image[start:end] = bytes(request.length)
        elif request.kind == STATUS:
            return self.extents(request, [(request.length, 0)])
        return self.nothing(request)

    def data(self, request: Request, content: bytes) -> bytes:
        if not self.structured:
            return struct.pack(">IIQ", SIMPLE_MAGIC, 0, request.handle) + content
        return chunk(request, DATA, struct.pack(">Q", request.offset) + content, DONE)

    def nothing(self, request: Request) -> bytes:
        return struct.pack(">IIQ", SIMPLE_MAGIC, 0, request.handle)

    def error(self, request: Request, number: int, text: bytes = b"") -> bytes:
        if not self.structured:
            return struct.pack(">IIQ", SIMPLE_MAGIC, number, request.handle)
        return chunk(request, ERROR, struct.pack(">IH", number, len(text)) + text, DONE)

    def extents(
        self, request: Request, pairs: list[tuple[int, int]], context: int = 1, flags: int = DONE
    ) -> bytes:
        body = struct.pack(">I", context) + b"".join(struct.pack(">II", *pair) for pair in pairs)
        return chunk(request, EXTENTS, body, flags)


def option_reply(option: int, kind: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    length = len(data) if length is None else length
    return struct.pack(">QIII", OPTION_REPLY_MAGIC, option, kind, length) + data


def chunk(
    request: Request, kind: int, data: bytes, flags: int = 0, *, length: int | None = None
) -> bytes:
    length = len(data) if length is None else length
    return struct.pack(">IHHQI", CHUNK_MAGIC, flags, kind, request.handle, length) + data
