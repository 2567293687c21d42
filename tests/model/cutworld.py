"""A world for the source side of points: the real Disk, Ledger, Changes, Frozen, SavedGranules,
FrozenView, PointSource, Cut and PointLag, between guests that are fibers and a far side in memory.

The oracle has the source's content at each cut. After each step each granule of the point in
progress must be safe (the invariant of nbdmirror/disk/frozen.py), and what is committed must be
exactly the content of a cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

from model.cutparts import (
    FiberDevice,
    FiberDisk,
    FiberLedger,
    FiberSpill,
    PointLoop,
    Write,
)
from model.fibers import Fiber, FiberCondition, FiberLock
from model.fineparts import BOUNDS
from model.parts import StepDevices

from nbdmirror.disk import fine, frozen, saved
from nbdmirror.disk.changes import Changes
from nbdmirror.disk.frozen import Frozen
from nbdmirror.disk.saved import Saved, SavedGranules
from nbdmirror.errors import DeviceError
from nbdmirror.mirror import buffers, frozen_view, point_source
from nbdmirror.mirror.cut import CUT_LIMIT_S, Cut
from nbdmirror.mirror.frozen_view import Chunk, FrozenView
from nbdmirror.mirror.point_lag import PointLag
from nbdmirror.mirror.point_source import PointSource, StoreOptions

GRANULE = 512
ENTRY_BYTES = 16
ZERO_UNIT_BYTES = 256
DRAIN_STEPS_MAX = 3000


class CutWorld:
    """Mutants override the classes, or `lose`."""

    ledger_class: type[FiberLedger] = FiberLedger
    disk_class: type[FiberDisk] = FiberDisk
    frozen_class: type[Frozen] = Frozen
    changes_class: type[Changes] = Changes
    saved_class: type[SavedGranules] = SavedGranules
    view_class: type[FrozenView] = FrozenView
    lag_class: type[PointLag] = PointLag
    points_class: type[PointSource] = PointSource
    cut_class: type[Cut] = Cut

    def __init__(
        self,
        content: bytes,
        *,
        unit: int,
        memory_bytes: int,
        spill_bytes: int,
        spill_fails: bool,
        breaks_guest_writes: bool,
    ) -> None:
        self._patches = ExitStack()
        for each in self._all_patches():
            self._patches.enter_context(cast("AbstractContextManager[object]", each))
        self.source = bytearray(content)
        self.size = len(content)
        self.far = bytes(content)
        """The content of the last committed point."""
        self.at_cut = b""
        """The content at the cut of the point in progress."""
        self.cut_writes: list[Write] = []
        """The writes that are in that point and in none before."""
        self.writes: list[Write] = []
        """Those in no point, in progress or answered."""
        self.sent: list[tuple[Chunk, list[tuple[int, int, bytes]]]] = []
        """On the way to the far side, with a copy of their content."""
        self.batch: list[tuple[int, int, bytes]] = []
        """What the far side has of the point in progress."""
        self.given: set[int] = set()
        """Granules whose content the sender has."""
        self.is_broken = False
        self.points_made = self.points_broken = self.cuts_late = 0
        self.breaks_guest_writes = breaks_guest_writes
        self.loop = PointLoop()
        self.device = FiberDevice(self.source)
        self.disk = self.disk_class(self.device, self.ledger_class())
        self.requests = StepDevices(self.source, bytearray(content))
        self.spill = FiberSpill(spill_bytes, spill_fails)
        self.changes = self.changes_class(self.disk, GRANULE, unit=unit)
        self.lag = self.lag_class(self.changes, self.loop.clock, self.loop.clock())
        loop: Any = self.loop
        self.points = self.points_class(
            changes=self.changes,
            source=self.requests,
            lag=self.lag,
            loop=loop,
            store=StoreOptions(memory_bytes, self.spill, breaks_guest_writes),
            on_chunk=self._on_chunk,
            on_more=lambda: None,
            on_broken=self._on_broken,
        )
        self.changes.begin()

    def _all_patches(self) -> list[Any]:
        values: list[tuple[Any, str, Any]] = [
            (saved, "ENTRY_BYTES", ENTRY_BYTES),
            (saved, "SPILL_READ_BYTES", 100),
            (frozen, "SAVE_BYTES", GRANULE),
            (frozen, "HOLE_BYTES_MIN", 3 * GRANULE),
            (frozen, "HOLE_BYTES", 4 * GRANULE),
            (frozen, "threading", SimpleNamespace(Lock=FiberLock, Condition=FiberCondition)),
            (frozen_view, "CHUNK_BYTES", 2 * GRANULE),
            (frozen_view, "HOLE_BYTES", 4 * GRANULE),
            (buffers, "ZERO_UNIT_BYTES", ZERO_UNIT_BYTES),
            (buffers, "_ZEROES", bytes(ZERO_UNIT_BYTES)),
            (point_source, "Frozen", self.frozen_class),
            (point_source, "SavedGranules", self.saved_class),
            (point_source, "FrozenView", self.view_class),
            *((fine, name, bound) for name, bound in BOUNDS.items()),
        ]
        return [patch.object(*value) for value in values]

    def close(self) -> None:
        for write in self.under_way:
            write.fiber.abandon()
        FiberLock.held = 0
        self._patches.close()

    # Guests.

    @property
    def under_way(self) -> list[Write]:
        return [write for write in self.writes if not write.fiber.is_over]

    def ask(self, kind: str, offset: int, content: bytes) -> Write:
        """A guest asks: `kind` is a method of Disk. A flush is no write, and is not told apart."""
        length = 0 if kind == "flush" else len(content)

        def call() -> None:
            try:
                if kind == "flush":
                    self.disk.flush()
                elif kind == "zero":
                    self.disk.zero(offset, length, may_trim=True, fua=False, fast=False)
                elif kind == "trim":
                    self.disk.trim(offset, length, fua=False)
                else:
                    self.disk.pwrite(content, offset, False)
            except (DeviceError, OSError):
                pass  # answered with an error: what is there is there
            write.ended_s = self.loop.now_s + self.loop.ticks * 1e-6

        write = Write(offset, length, Fiber(call))
        self.writes.append(write)
        return write

    def step(self, write: Write, *, fails: bool = False) -> None:
        if not write.fiber.is_over:
            write.fiber.fails_next = fails and write.fiber.where.startswith("in ")
            write.fiber.resume()
            self.check()

    # The cut.

    def cut(self) -> None:
        """Try to begin a point, unless one is in progress."""
        if self.changes.frozen is not None or self.disk.ledger.gate is not None:
            return
        self.points.prepare()
        loop: Any = self.loop
        self.cut_class(
            [self.disk.ledger],
            loop=loop,
            take=self._take,
            on_taken=lambda held_s: None,
            on_late=self._on_late,
        ).start()

    def _take(self) -> None:
        self.at_cut = bytes(self.source)
        self.points.take()
        self.cut_writes += [write for write in self.writes if write.ended_s >= 0]
        self.writes = [write for write in self.writes if write.ended_s < 0]
        self.given.clear()
        self.batch = []

    def _on_late(self, held_s: float) -> None:
        assert held_s <= CUT_LIMIT_S + 1, "guests are held for ever"
        self.cuts_late += 1

    # The sender.

    def _on_chunk(self, chunk: Chunk) -> None:
        runs = [
            (at, span, bytes(span) if content is None else bytes(content))
            for at, span, content in chunk.runs
        ]
        for at, span, content in runs:
            assert content == self.at_cut[at : at + span], f"{at}: not the content of the cut"
            granules = range(at // GRANULE, _granules(at + span))
            self.given.update(granules)
        self.sent.append((chunk, runs))

    def read_next(self, count: int) -> None:
        for _ in range(count):
            if self.points.view is None or not self.points.view.read_next():
                return
            self.check()

    def end_read(self, which: int, outcome: str) -> None:
        if self.requests.requests:
            request = self.requests.requests[which % len(self.requests.requests)]
            if outcome == "half":
                request.go_on(0.5)
            else:
                self.requests.end(request, outcome)
        elif self.spill.reads:
            self.spill.reads.pop(which % len(self.spill.reads))()

    def acknowledge(self, which: int) -> None:
        if self.sent and self.points.view is not None:
            chunk, runs = self.sent.pop(which % len(self.sent))
            for (_, _, content), (_, _, before) in zip(chunk.runs, runs, strict=True):
                assert content is None or content == before, "memory in flight was used again"
            self.batch += runs
            self.points.view.settled(chunk)

    def lose(self) -> None:
        """The link breaks: nobody knows what the far side has."""
        self.points.break_off(DeviceError("the link is cut"))

    def commit(self) -> None:
        view = self.points.view
        if view is None or not view.is_settled:
            return
        far = bytearray(self.far)
        for at, span, content in self.batch:
            far[at : at + span] = content
        assert far == self.at_cut, "the point is not the content of its cut"
        if self.points.committed():
            self.far = bytes(far)
            self.cut_writes = []
            self.points_made += 1

    def _on_broken(self, error: BaseException) -> None:
        self.points_broken += 1
        self.sent.clear()
        self.writes = self.cut_writes + self.writes
        self.cut_writes = []

    # What must hold.

    def check(self) -> None:
        assert not FiberLock.held
        self._check_granules()
        self._check_may_differ()

    def _check_granules(self) -> None:
        point = self.changes.frozen
        if point is None or point.error is not None:
            return
        kept = {
            granule: entry
            for entry in self._saved(point.saved)
            for granule in range(entry.offset // GRANULE, _granules(entry.offset + entry.length))
        }
        for granule in range(_granules(self.size)):
            offset = granule * GRANULE
            if not point.covered.is_dirty(offset, 1) or granule in self.given:
                continue
            for start, length in point.covered.parts_in(offset, GRANULE) or ((offset, GRANULE),):
                then = self.at_cut[start : start + length]
                if granule in kept:
                    assert _content(kept[granule], start, len(then)) == then, (
                        f"the store has something else at {start}"
                    )
                else:
                    assert self.source[start : start + len(then)] == then, (
                        f"lost: {start} is overwritten, and was neither read nor saved"
                    )

    def _saved(self, saved: SavedGranules) -> Iterator[Saved]:
        """All that is in the store: in memory, and in the spill file, up to what was read."""
        yield from saved._entries
        at = saved._next
        while at < saved._end:
            entry, length = Saved.from_record(memoryview(self.spill.content)[at:])
            if at in saved._failed:
                length = saved._failed[at]
            elif at in saved._writing:
                length = self.spill.writing[at]
            else:
                assert entry is not None
                yield entry
            at += length

    def _check_may_differ(self) -> None:
        if self.far == self.source:
            return
        may_differ = self.changes.may_differ()
        for offset in range(0, self.size, GRANULE):
            part = slice(offset, min(offset + GRANULE, self.size))
            assert (
                self.far[part] == self.source[part]
                or may_differ.is_dirty(offset, 1)
                or any(w.offset < part.stop and part.start < w.offset + w.length
                       for w in self.under_way)
            ), f"forgotten: {offset} is in no point, and is not told to differ"  # fmt: skip

    def check_lag(self) -> None:
        """Before each look the time is what it was when the last write was answered, or later."""
        now_s = self.loop.now_s + self.loop.ticks * 1e-6
        answered = [w for w in self.cut_writes + self.writes if w.ended_s >= 0 and w.length]
        lag_s = self.lag.lag_s
        if answered:
            oldest_s = now_s - min(write.ended_s for write in answered)
            assert lag_s >= oldest_s - 1e-9, f"lag {lag_s}, and a write is {oldest_s} old"
        elif not self.under_way and self.changes.may_differ().is_empty:
            assert lag_s == 0, "all is committed, and the lag is not over"

    # The end.

    def drain(self) -> None:
        """From now on all goes well. First guests must get through, whatever the far side does."""
        self.spill.fails = False
        for _ in range(DRAIN_STEPS_MAX):
            if not self.under_way:
                break
            for write in self.under_way:
                self.step(write)
            while self.requests.requests:
                self.end_read(0, "well")
            self.loop.turn(0.01)
            self.check()
        assert not self.under_way, "a guest waits for the far side, or for ever"
        for _ in range(3):
            self.make_point()
        assert self.far == self.source
        assert self.changes.may_differ().is_empty
        self.lag.look()
        self.check_lag()

    def make_point(self) -> None:
        """With the one in progress, and no guest beside it."""
        for _ in range(2):
            for _ in range(99):
                self.cut()
                self.loop.turn()
                self.read_next(9)
                while self.requests.requests or self.spill.reads:
                    self.end_read(0, "well")
                while self.sent and self.points.view is not None:
                    self.acknowledge(0)
                view = self.points.view
                if view is not None and view.is_settled:
                    break
            else:
                raise AssertionError("the point is never read to its end")
            self.commit()
            self.check()


def _granules(end: int) -> int:
    return -(-end // GRANULE)


def _content(entry: Saved, start: int, length: int) -> bytes:
    if entry.content is None:
        return bytes(length)
    at = start - entry.parts[0][0]
    return bytes(entry.content[at : at + length])
