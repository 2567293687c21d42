"""A source that sends points to a journal, and two exports that lose what they can.

The source here is the simplest that keeps its side of the bargain: at a cut the whole content is
remembered, and what is sent is read from there. Everything behind that is the real code.

After each step `check` does what a user may do at that moment (pointrecovery.py): the power of the
far side fails, and a point is recovered from what is left. It must be what the disk was at one of
the cuts, the last announced one or a later one; so must each older point that is on offer. A
recovery may be killed, with another loss of power, and is then done again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from random import Random
from typing import Any, TypeVar
from unittest.mock import patch

from model.pointexports import Disk, DiskDevice, Pending, SlowExport, content
from model.pointrecovery import check_power_cuts
from support.rings import rings_of

from nbdmirror.errors import DeviceError
from nbdmirror.points import applier, last_batch, ownership
from nbdmirror.points.format import BLOCK_BYTES, RING_START, JournalError, State
from nbdmirror.points.requests import Program, Side, run, start
from nbdmirror.points.writer import JournalFull, JournalWriter

Result = TypeVar("Result")

BLOCKS = 6
RING_BLOCKS = (10, 16, 24)


class PointWorld:
    """Mutants override what they break."""

    writer_class: type[JournalWriter] = JournalWriter
    place_bytes = 0
    """Behind the ring."""
    losses = 1
    """Random power cuts that are tried after each step, beside the two extremes."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self._patches = ExitStack()
        ring = self.random.choice(RING_BLOCKS) * BLOCK_BYTES
        self._patches.enter_context(rings_of(ring))
        self._patches.enter_context(patch.object(ownership, "JournalWriter", self.writer_class))
        if self.random.random() < 0.5:  # the image becomes each point by what the journal has
            self._patches.enter_context(patch.object(last_batch, "KEPT_BYTES", 0))
        self.image = SlowExport("image", Disk(BLOCKS * BLOCK_BYTES, 0xEE))
        self.journal = SlowExport("journal", Disk(RING_START + ring + self.place_bytes))
        self.exports = {Side.IMAGE: self.image, Side.JOURNAL: self.journal}
        self.times = itertools.count(1)
        self.stamps = itertools.count(1)
        self.blocks: list[int] = [0] * BLOCKS
        """The disk: the stamp of each block; 0: zeroes."""
        self.cuts: dict[int, list[int]] = {}
        """Time of a cut -> the disk then."""
        self.create()

    def close(self) -> None:
        self._patches.close()

    # The source.

    def create(self) -> None:
        """A new journal, on an export whose ring may hold anything."""
        self.journal.disk.write({n: bytes(512) for n in range(RING_START // 512)})
        self.journal.disk.flush()
        program = ownership.create(
            "journal",
            self.journal.size,
            disk_bytes=self.image.size,
            now_ns=0,
            random_bytes=self.random.randbytes,
        )
        self.disk_id = run(program, self.sides()).disk_id
        self.announced = 0
        """Time of the last point that was announced; 0: none, or the image is being seeded."""
        self.applied = 0
        """The last point that was asked to be applied."""
        self.sequences: dict[int, int] = {}
        """Time of an announced point -> its sequence."""
        self.dirty = set(range(BLOCKS))
        self.unsent: set[int] = set()
        self.frozen: set[int] = set()
        self.time_ns = 0
        self.take_over()

    def sides(self) -> dict[Side, DiskDevice]:
        return {side: DiskDevice(export.disk) for side, export in self.exports.items()}

    def take_over(self, before: JournalWriter | None = None) -> None:
        """A new process, or a new connection of the one that has the writer `before`. What was
        under way is over."""
        self.phase = "closed"
        self.is_applying = False
        for export in self.exports.values():
            export.break_off(self.random)
        opening = ownership.take_over(
            self.exports,
            disk_id=self.disk_id,
            before=before,
            random_bytes=self.random.randbytes,
        )
        self.writer = self.now(opening)
        self.phase = "idle"
        if self.writer.superblocks.current.state is not State.OK:
            self.seed()  # what was copied in place may be lost
        elif self.writer.newest.time_ns != self.time_ns:
            self.dirty |= self.frozen  # the open point is not there
        elif self.writer.superblocks.current.state is State.OK:
            self.announce(self.time_ns, self.writer.newest.sequence)
        self.frozen, self.unsent = set(), set()

    def now(self, program: Program[Result]) -> Result:
        """Carry a program out at once."""
        results: list[tuple[Any, BaseException | None]] = []
        start(program, self.exports, lambda *result: results.append(result))
        while not results:
            for export in self.exports.values():
                while export.pending:
                    export.end(0)
        ((result, error),) = results
        if error is not None:
            raise error
        done: Result = result
        return done

    def seed(self) -> None:
        """Copy everything in place: there is no point meanwhile."""
        self.announced = 0
        self.sequences.clear()
        self.now(self.seeding())
        self.seed_in_place()
        self.dirty = set()

    def seeding(self) -> Program[None]:
        return self.writer.seed(0)

    def seed_in_place(self) -> None:
        for block, stamp in enumerate(self.blocks):
            buf = memoryview(content(stamp))
            self.image.start_write(buf, block * BLOCK_BYTES, lambda error: None)
            self.image.end(0)

    def write(self, first: int, count: int, *, zero: bool) -> None:
        """A guest's write."""
        for block in range(first, min(first + count, BLOCKS)):
            self.blocks[block] = 0 if zero else next(self.stamps)
            self.dirty.add(block)

    def cut(self) -> None:
        if self.phase != "idle":
            return
        time_ns = next(self.times)
        try:
            self.writer.begin(time_ns, bytes_max=len(self.dirty) * BLOCK_BYTES)
        except JournalFull:
            return
        except JournalError:  # nobody knows whether the last point is there
            self.kill()
            return
        self.time_ns = time_ns
        self.cuts[time_ns] = list(self.blocks)
        self.frozen, self.dirty = self.dirty, set()
        self.unsent = set(self.frozen)
        self.sent_badly = False
        self.phase = "open"

    def send(self) -> None:
        """The next run of equal kind of the frozen set."""
        if self.phase != "open" or not self.unsent:
            return
        first = min(self.unsent)
        cut = self.cuts[self.time_ns]
        end = first + 1
        while end in self.unsent and (cut[end] == 0) == (cut[first] == 0):
            end += 1
        self.unsent -= set(range(first, end))
        offset, length = first * BLOCK_BYTES, (end - first) * BLOCK_BYTES
        data = memoryview(b"".join(map(content, cut[first:end]))) if cut[first] else None
        self.writer.put([(offset, length, data)], self.sent)

    def sent(self, error: BaseException | None) -> None:
        if error is not None and self.phase == "open":
            self.sent_badly = True

    def finish(self) -> None:
        """Commit the open point if all of it is there, or give it up."""
        if self.phase != "open" or self.unsent or self.writer.is_busy:
            return
        if self.breaks_at_errors and self.sent_badly:
            self.give_up()
            return
        self.phase = "committing"
        self.writer.commit(self.committed)

    breaks_at_errors = True

    def committed(self, error: BaseException | None) -> None:
        if self.phase != "committing":
            return  # of a process that was killed
        self.phase = "idle"
        if error is None:
            self.announce(self.time_ns, self.writer.newest.sequence)
            self.frozen = set()
        else:
            assert isinstance(error, DeviceError | JournalError), error
            self.dirty |= self.frozen

    def announce(self, time_ns: int, sequence: int) -> None:
        self.announced = time_ns
        self.sequences[time_ns] = sequence

    def give_up(self) -> None:
        if self.phase != "open":
            return
        self.phase = "breaking"
        self.dirty |= self.frozen
        self.frozen = set()

        def ended(error: BaseException | None) -> None:
            if self.phase == "breaking":
                self.phase = "idle"

        self.writer.give_up(ended)

    def apply(self, back: int) -> None:
        """Have the image hold the point that is `back` points from the newest."""
        headers = self.writer.headers
        if self.is_applying or self.phase == "closed" or len(headers) <= back:
            return
        if self.writer.superblocks.current.state is not State.OK:
            return
        sequence = headers[-1 - back].point.sequence
        # A later one may have been begun, and not ended.
        self.applied, self.is_applying = max(self.applied, sequence), True
        writer = self.writer

        def ended(_: None, error: BaseException | None) -> None:
            if writer is self.writer:
                self.is_applying = False
            assert error is None or isinstance(error, DeviceError | JournalError), error

        start(self.applying(sequence), self.exports, ended)

    def applying(self, sequence: int) -> Program[None]:
        return applier.apply(self.writer, sequence)

    def whole_point(self, how: str) -> None:
        """From the cut to the announcement, if `how` is "all". Else a request fails, or one comes
        late, or no trim ends, or what is in flight ends in part; or the point is given up, or the
        source is killed while it commits; or nothing is waited for once it is announced."""
        self.cut_and_send()
        if how == "give up":
            self.give_up()
            return
        if how == "quick":
            self.end_while(lambda: self.writer.is_busy)
            self.finish()
            self.end_while(lambda: self.phase == "committing")
            return
        late = self.random.sample(self.in_flight, 1) if how == "late" and self.in_flight else []
        for _ in range(2):
            if how == "fail" and self.random.random() < 0.5:
                self.end_request(self.random.randrange(12), fails=True)
            self.end_all(but=how, late=late)
            self.finish()
            if how == "kill" and self.phase == "committing":
                for _ in range(self.random.randrange(10)):
                    self.end_request(self.random.randrange(12), fails=False)
                self.kill()
                return
        self.end_all(but=how, late=late)

    def point_beside(self, late: Sequence[Pending]) -> None:
        """The same, without trouble; what is `late` stays in flight."""
        self.cut_and_send()
        self.end_all(late=late)
        self.finish()
        self.end_all(late=late)

    def cut_and_send(self) -> None:
        self.cut()
        while self.phase == "open" and self.unsent:
            self.send()

    @property
    def in_flight(self) -> list[Pending]:
        return [one for export in self.exports.values() for one in export.pending]

    @property
    def durable_writes(self) -> list[Pending]:
        return [one for one in self.journal.pending if one.name == "durable write"]

    def end_while(self, is_so: Callable[[], bool]) -> None:
        """End requests in any order, and no more than are needed."""
        while is_so() and any(export.pending for export in self.exports.values()):
            self.end_request(self.random.randrange(12), fails=False)

    def end_all(self, but: str = "", late: Sequence[Pending] = ()) -> None:
        """End what is in flight, in any order; in part if `but` is "part", or no request of that
        name; or all but those that are late."""
        while left := [
            (export, request)
            for export in self.exports.values()
            for request in export.pending
            if request.name != but and request not in late
        ]:
            export, request = self.random.choice(left)
            if but == "part" and self.random.random() < 0.1:
                return
            export.end(export.pending.index(request))

    # Trouble.

    def start_over(self) -> None:
        """After an outage everything is copied in place."""
        if self.phase == "idle" and not self.is_applying:
            self.end_all()
            self.seed()

    def create_again(self) -> None:
        """The journal is thrown away, and a new one is made where it was."""
        if self.phase == "idle" and not self.is_applying:
            self.end_all()
            self.create()

    def end_request(self, number: int, *, fails: bool) -> None:
        exports = [export for export in self.exports.values() if export.pending]
        if not exports:
            return
        export = exports[number % len(exports)]
        export.end(number // 2 % len(export.pending), fails=fails)

    def forget(self, number: int) -> None:
        """A durable write or a flush fails, and what it was to make last is forgotten. Of the first
        copy of an image the copier knows; here it is not sent again."""
        is_ok = self.writer.superblocks.current.state is State.OK
        possible = [
            (export, request)
            for export in (self.journal, self.image)
            for request in export.pending
            if request.name in ("durable write", "flush") and (is_ok or export is self.journal)
        ]
        if possible:
            export, request = possible[number % len(possible)]
            export.end_forgotten(export.pending.index(request), self.random.choice)

    def kill(self) -> None:
        """The source's process ends, and another begins. It may differ in what was under way."""
        self.phase = "closed"
        for export in self.exports.values():
            export.abandon(self.random)
        self.take_over()

    def lose_power(self) -> None:
        """Of both exports: the connections are lost, and so is what was not flushed."""
        self.phase = "closed"
        for export in self.exports.values():
            export.break_off(self.random)
            export.disk.cut_power(self.random.choice)
        self.take_over(self.writer)

    def lose_link(self) -> None:
        """To both exports; nothing else."""
        self.phase = "closed"
        for export in self.exports.values():
            export.break_off(self.random)
        self.take_over(self.writer)

    # What must hold.

    def check(self) -> None:
        check_power_cuts(self)
