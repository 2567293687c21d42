"""A copier between a source and a target in memory, with an observer, a clock that moves by hand,
and a note of all that it starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from nbdmirror.devices.base import Done, Extent, ExtentsDone, MemoryDevice
from nbdmirror.disk.tracker import Tracker
from nbdmirror.mirror import buffers as buffer_module
from nbdmirror.mirror.buffers import PageBuffer
from nbdmirror.mirror.copier import REQUEST_BYTES_MAX, Copier

KIB, MIB = 1 << 10, 1 << 20


def frames() -> int:
    """How deep the stack is."""
    count, frame = 0, sys._getframe()
    while back := frame.f_back:
        count, frame = count + 1, back
    return count


class Devices:
    """Source and target in memory. Requests are noted in `started`; each ends at once, or is kept
    in `kept` where `keeps` names its kind. `errors`: what requests of a kind end with."""

    def __init__(self, source: MemoryDevice, *, keeps: tuple[str, ...] = ()) -> None:
        self.device = source
        self.size = source.size
        self.target = bytearray(b"\xee") * (source.size if source.size <= 64 * MIB else 0)
        self.keeps = keeps
        self.errors: dict[str, OSError] = {}
        self.started: list[tuple[str, int, int]] = []
        self.kept: list[Callable[[], None]] = []
        self.may_trim: set[bool] = set()
        self.frames_max = 0

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        self._do("read", offset, len(buf), lambda: self.device.pread(buf, offset), done)

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        found: list[Extent] = []

        def then(error: BaseException | None) -> None:
            done(None if error else found, error)

        self._do(
            "extents",
            offset,
            length,
            lambda: found.extend(self.device.extents(offset, length)),
            then,
        )

    def start_write(self, buf: memoryview, offset: int, done: Done) -> None:
        def write() -> None:
            self.target[offset : offset + len(buf)] = buf

        self._do("write", offset, len(buf), write, done)

    def start_zero(self, offset: int, length: int, may_trim: bool, done: Done) -> None:
        def write() -> None:
            if self.target:
                self.target[offset : offset + length] = bytes(length)

        self.may_trim.add(may_trim)
        self._do("zero", offset, length, write, done)

    def start_flush(self, done: Done) -> None:
        self._do("flush", 0, 0, lambda: None, done)

    def _do(
        self, kind: str, offset: int, length: int, work: Callable[[], None], done: Done
    ) -> None:
        self.started.append((kind, offset, length))
        self.frames_max = max(self.frames_max, frames())

        def end() -> None:
            error = self.errors.get(kind)
            if error is None:
                work()
            done(error)

        if kind in self.keeps:
            self.kept.append(end)
        else:
            end()

    def of(self, *kinds: str) -> list[tuple[int, int]]:
        return [(offset, length) for kind, offset, length in self.started if kind in kinds]


class Watcher:
    """The observer: notes, and stops the copier at an error."""

    copier: Copier

    def __init__(self) -> None:
        self.failed: list[tuple[str, BaseException]] = []
        self.settled = 0

    def copy_failed(self, operation: str, error: BaseException) -> None:
        self.failed.append((operation, error))
        self.copier.stop()

    def copy_settled(self) -> None:
        assert self.copier.in_flight == 0
        self.settled += 1


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.timers.append((self.now_s + delay_s, call))

    def advance(self, elapsed_s: float) -> None:
        self.now_s += elapsed_s
        due = [call for at_s, call in self.timers if at_s <= self.now_s]
        self.timers = [(at_s, call) for at_s, call in self.timers if at_s > self.now_s]
        for call in due:
            call()


def a_copier(
    devices: Devices,
    *,
    granularity: int = 64 * KIB,
    unit: int = 0,
    clock: Clock | None = None,
    **options: Any,
) -> tuple[Copier, Tracker, Watcher]:
    """All dirty, not started. No request is larger than the others, unless `request_bytes_max` has
    room for one."""
    options.setdefault("request_bytes_max", REQUEST_BYTES_MAX)
    clock = clock or Clock()
    tracker = Tracker(devices.size, granularity, unit=unit)
    tracker.dirty.mark_all()
    watcher = Watcher()
    watcher.copier = Copier(
        source=devices,
        target=devices,
        tracker=tracker,
        observer=watcher,
        clock=clock,
        call_later=clock.call_later,
        **options,
    )
    return watcher.copier, tracker, watcher


def buffers_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all buffers that are made from now on, not of those that are used again."""
    made: list[int] = []

    def make(length: int) -> PageBuffer:
        made.append(length)
        return PageBuffer(length)

    monkeypatch.setattr(buffer_module, "PageBuffer", make)
    return made


def data(size: int) -> MemoryDevice:
    """No zeroes anywhere."""
    device = MemoryDevice(0)
    device.size, device.data = size, bytearray(range(1, 252)) * (size // 251 + 1)
    del device.data[size:]
    device.allocated = bytearray(b"\1") * -(-size // device.BLOCK_BYTES)
    return device
