"""Programs: what has to be read and written in which order, apart from who carries that out.

A program is a generator that yields requests, a list at a time: all of a list may be in flight at
once, and the program continues when all have ended. `run` carries a program out with blocking
devices (a command, a helper thread), `start` with asynchronous ones (the event loop), and a test
with devices that lose what was not flushed. So there is one order for all three.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

from nbdmirror.devices.base import AsyncSource, AsyncTarget, BlockDevice, Buffer, Done

Result = TypeVar("Result")


class Side(Enum):
    """Which export a request is for."""

    IMAGE = "image"
    JOURNAL = "journal"


class AsyncExport(AsyncSource, AsyncTarget, Protocol):
    """An export for programs on the event loop; the rules of AsyncSource."""

    description: str

    def start_durable_write(self, buf: memoryview, offset: int, done: Done) -> None:
        """As `start_write`; durable at the end. A flush follows where there is no FUA."""

    def start_trim(self, offset: int, length: int, done: Done) -> None:
        """The content of the range is not needed any more. Without an error if the export has no
        trim."""


@dataclass(frozen=True, slots=True)
class Read:
    side: Side
    buf: memoryview
    offset: int

    def run(self, device: BlockDevice) -> None:
        device.pread(self.buf, self.offset)

    def start(self, export: AsyncExport, done: Done) -> None:
        export.start_read(self.buf, self.offset, done)


@dataclass(frozen=True, slots=True)
class Write:
    side: Side
    buf: Buffer
    offset: int
    is_durable: bool = False
    """Durable at the end of the request; other writes when a later flush has ended."""

    def run(self, device: BlockDevice) -> None:
        device.pwrite(self.buf, self.offset, self.is_durable)

    def start(self, export: AsyncExport, done: Done) -> None:
        write = export.start_durable_write if self.is_durable else export.start_write
        write(memoryview(self.buf), self.offset, done)


@dataclass(frozen=True, slots=True)
class Zero:
    side: Side
    offset: int
    length: int

    def run(self, device: BlockDevice) -> None:
        device.zero(self.offset, self.length, may_trim=True)

    def start(self, export: AsyncExport, done: Done) -> None:
        export.start_zero(self.offset, self.length, True, done)


@dataclass(frozen=True, slots=True)
class Trim:
    side: Side
    offset: int
    length: int

    def run(self, device: BlockDevice) -> None:
        device.trim(self.offset, self.length)

    def start(self, export: AsyncExport, done: Done) -> None:
        export.start_trim(self.offset, self.length, done)


@dataclass(frozen=True, slots=True)
class Flush:
    side: Side

    def run(self, device: BlockDevice) -> None:
        device.flush()

    def start(self, export: AsyncExport, done: Done) -> None:
        export.start_flush(done)


class Turns:
    """Lets one program at a time do something: a program yields `Turn(turns)`, and calls `release`
    at the end. On one thread."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: deque[Done] = deque()

    def take(self, done: Done) -> None:
        if self._is_taken:
            self._waiting.append(done)
        else:
            self._is_taken = True
            done(None)

    def release(self) -> None:
        if self._waiting:
            self._waiting.popleft()(None)
        else:
            self._is_taken = False


@dataclass(frozen=True, slots=True)
class Turn:
    turns: Turns
    side: Side = Side.JOURNAL

    def run(self, device: BlockDevice) -> None:
        self.turns.take(lambda _: None)

    def start(self, export: AsyncExport, done: Done) -> None:
        self.turns.take(done)


@dataclass(frozen=True, slots=True)
class Pause:
    """Of a program that waits for another process. Such a program is carried out by `run` alone."""

    seconds: float
    side: Side = Side.JOURNAL

    def run(self, device: BlockDevice) -> None:
        time.sleep(self.seconds)

    def start(self, export: AsyncExport, done: Done) -> None:
        raise NotImplementedError


Request = Read | Write | Zero | Trim | Flush | Turn | Pause
Program = Generator[Sequence[Request], None, Result]
Devices = Mapping[Side, BlockDevice]
Exports = Mapping[Side, AsyncExport]


def run(program: Program[Result], devices: Devices) -> Result:
    """Carry a program out, request after request. Raises what the program raises, IO_ERRORS too."""
    error: BaseException | None = None
    try:
        while True:
            requests, error = _step(program, error), None
            for request in requests:
                try:
                    request.run(devices[request.side])
                except Exception as caught:  # noqa: BLE001 - the program raises it
                    error = caught
                    break
    except StopIteration as end:
        result: Result = end.value
        return result


def start(
    program: Program[Result],
    exports: Exports,
    done: Callable[[Result | None, BaseException | None], None],
) -> None:
    """Carry a program out on the event loop's thread. `done` is called once, with the result or the
    error, when no request of the program is in flight."""
    _Started(program, exports, done).go_on()


def _step(program: Program[Result], error: BaseException | None) -> Sequence[Request]:
    """The next requests. The program gets `error` of the last ones."""
    return next(program) if error is None else program.throw(error)


def around(
    program: Program[Result], before: Callable[[Sequence[Request]], Program[Sequence[Request]]]
) -> Program[Result]:
    """`program`, with a program of `before` ahead of each list of its requests, which returns the
    requests that are done in place of these. What that one raises ends both."""
    error: BaseException | None = None
    while True:
        try:
            requests = _step(program, error)
        except StopIteration as end:
            result: Result = end.value
            return result
        requests, error = (yield from before(requests)), None
        try:
            yield requests
        except Exception as caught:  # noqa: BLE001 - the program raises it
            error = caught


class _Started:
    def __init__(
        self,
        program: Program[Result],
        exports: Exports,
        done: Callable[[Result | None, BaseException | None], None],
    ) -> None:
        self._program = program
        self._exports = exports
        self._done = done
        self._pending = 0
        self._error: BaseException | None = None

    def go_on(self) -> None:
        """Start the next requests, until some are in flight. A loop, since requests may end at
        once."""
        while True:
            error, self._error = self._error, None
            try:
                requests = _step(self._program, error)
            except StopIteration as end:
                self._done(end.value, None)
                return
            except Exception as caught:  # noqa: BLE001 - unreported, the program would never end
                self._done(None, caught)
                return
            self._pending = 1 + len(requests)
            for request in requests:
                request.start(self._exports[request.side], self._ended)
            self._pending -= 1
            if self._pending:
                return

    def _ended(self, error: BaseException | None) -> None:
        self._error = self._error or error
        self._pending -= 1
        if not self._pending:
            self.go_on()
