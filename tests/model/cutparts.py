"""The parts of a world for the source side of points (cutworld.py): an event loop, a ledger, a disk
and its source, whose guests pause wherever another thread may go on."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from model.fibers import Fiber, FiberEvent, FiberSet, fails_here, pause
from model.parts import EXTENT_UNIT_BYTES, StepLoop

from nbdmirror.devices.base import BlockDevice, BlockSize, Buffer, Done, Extent, merge_extents
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.frozen import Frozen
from nbdmirror.disk.ledger import Ledger
from nbdmirror.errors import DeviceError


class PointLoop(StepLoop):
    """The event loop: what was posted runs at the next turn."""

    def __init__(self) -> None:
        super().__init__()
        self.posted: list[Callable[[], None]] = []
        self.ticks = 0

    def clock(self) -> float:
        """No two looks at the clock are at the same time."""
        self.ticks += 1
        return self.now_s + self.ticks * 1e-6

    def call_soon(self, call: Callable[[], None]) -> None:
        self.posted.append(call)

    def turn(self, elapsed_s: float = 0.0) -> None:
        posted, self.posted = self.posted, []
        for call in posted:
            call()
        super().turn(elapsed_s)


class FiberLedger(Ledger):
    """A guest pauses before it marks."""

    def __init__(self) -> None:
        super().__init__()
        self.writing = FiberSet()

    def leave(self, token: int, offset: int, length: int, settled: Any = None) -> None:
        pause("before the mark")
        super().leave(token, offset, length, settled)

    def close_gate(self, on_idle: Callable[[], None], *, holds_flushes: bool = True) -> None:
        super().close_gate(on_idle, holds_flushes=holds_flushes)
        gate: Any = self.gate
        gate.opened = FiberEvent()


class FiberDisk(Disk):
    """A guest pauses before it looks at the frozen set."""

    def __init__(self, source: BlockDevice, ledger: Ledger) -> None:
        self._frozen: Frozen | None = None
        super().__init__("disk", source)
        self.ledger = ledger

    @property
    def frozen(self) -> Frozen | None:
        pause("before the look")
        return self._frozen

    @frozen.setter
    def frozen(self, new: Frozen | None) -> None:
        self._frozen = new


class FiberDevice(BlockDevice):
    """The source, as guests use it: each I/O has two halves, and may fail after the first one."""

    description = "source"
    read_only = False
    block_size = BlockSize()

    def __init__(self, content: bytearray) -> None:
        self.content = content
        self.size = len(content)

    def _move(self, what: str, length: int, move: Callable[[int, int], None]) -> None:
        pause(f"before {what}")
        move(0, length // 2)
        pause(f"in {what}")
        if fails_here():
            raise DeviceError(f"{what} failed")
        move(length // 2, length)

    def pread(self, buf: memoryview, offset: int) -> None:
        def move(start: int, end: int) -> None:
            buf[start:end] = self.content[offset + start : offset + end]

        self._move("a read", len(buf), move)

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        def move(start: int, end: int) -> None:
            self.content[offset + start : offset + end] = buf[start:end]

        self._move("a write", len(buf), move)
        pause("after a write")

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_trim: bool = False,
        fua: bool = False,
        fast: bool = False,
    ) -> None:
        self.pwrite(bytes(length), offset)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Blocks that the range covers whole read as zeroes, the rest is kept."""
        start = -(-offset // EXTENT_UNIT_BYTES) * EXTENT_UNIT_BYTES
        stop = (offset + length) // EXTENT_UNIT_BYTES * EXTENT_UNIT_BYTES
        if start < stop:
            self.pwrite(bytes(stop - start), start)

    def flush(self) -> None:
        pause("in a flush")

    def cache(self, offset: int, length: int) -> None:
        raise AssertionError("nobody asks for this")

    def close(self) -> None:
        raise AssertionError("nobody asks for this")

    def extents(self, offset: int, length: int) -> list[Extent]:
        found = []
        for start in range(offset, offset + length, EXTENT_UNIT_BYTES):
            stop = min(start + EXTENT_UNIT_BYTES, offset + length)
            zero = not any(self.content[start:stop])
            found.append(Extent(stop - start, zero=zero, hole=zero))
        pause("after extents")
        return merge_extents(found)


class FiberSpill:
    """A spill file; `fails`: its storage is full, whatever its size."""

    def __init__(self, size: int, fails: bool) -> None:
        self.size = size
        self.content = bytearray(size)
        self.fails = fails
        self.reads: list[Callable[[], None]] = []
        self.writing: dict[int, int] = {}

    def write(self, content: bytes, place: int) -> None:
        self.writing[place] = len(content)
        pause("before a spill")
        if self.fails:
            raise OSError(errno.ENOSPC, "no space left")
        assert place + len(content) <= self.size
        self.content[place : place + len(content)] = content
        pause("after a spill")

    def start_read(self, buf: memoryview, place: int, done: Done) -> None:
        def read() -> None:
            buf[:] = self.content[place : place + len(buf)]
            done(None)

        self.reads.append(read)


@dataclass(slots=True, eq=False)
class Write:
    """A guest's request, from its begin on."""

    offset: int
    length: int
    fiber: Fiber
    ended_s: float = -1.0
    """When it was answered; below zero before."""
    is_changing: bool = False
