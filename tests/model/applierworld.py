"""A world of points (pointworld.py) with an applier beside the image: another process, which has
connections of its own to the same two exports.

The applier is the real one (points/follower.py), and so is the source's side (delegation.py). It
polls the journal all the time, so its requests end only when a step says so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

from model.pointexports import Disk, DiskDevice, SlowExport, content, sectors_of
from model.pointrecovery import check_left
from model.pointworld import PointWorld

from nbdmirror.errors import DeviceError
from nbdmirror.points import appliers_block, delegation, ownership, recovery
from nbdmirror.points.appliers_block import GONE_S, Watch
from nbdmirror.points.follower import Follower
from nbdmirror.points.format import BLOCK_BYTES, JournalError, State
from nbdmirror.points.reader import read
from nbdmirror.points.requests import Pause, Program, Side, run, start

PLACE_BYTES = 2 * BLOCK_BYTES
WORK_MAX = 400
"""Requests of an applier within which it has done what it can."""
WRITE_MAX = 80
"""The same, within which it has begun to write."""


class BesideDevice(DiskDevice):
    """An export for a recovery beside an applier, whose requests end in between."""

    def __init__(self, world: AppliedWorld, disk: Disk) -> None:
        super().__init__(disk)
        self._world = world

    def _go_on(self) -> None:
        self._world.held -= 1
        if self._world.held < 0:
            self._world.go_on(self._world.random.randrange(self._world.pace))

    def pread(self, buf: memoryview, offset: int) -> None:
        self._go_on()
        super().pread(buf, offset)

    def pwrite(self, buf: bytes | bytearray | memoryview, offset: int, fua: bool = False) -> None:
        self._go_on()
        if fua and self._world.random.random() < 0.3:
            self._world.go_on_until_it_writes()
        super().pwrite(buf, offset, fua)
        self._go_on()


class AppliedWorld(PointWorld):
    """Mutants override what they break."""

    place_bytes = PLACE_BYTES
    follower_class: type[Follower] = Follower

    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.watch = Watch()
        self.follower: Follower | None = None
        """None: there is no applier."""
        self.is_to_end = self.is_pausing = False
        self.held, self.pace = 0, 1
        """So many requests of a recovery end before the next one of the applier does. After that
        fewer than `pace` of the applier end beside each one."""
        with ExitStack() as stack:
            for one in self.world_patches():
                stack.enter_context(one)
            super().__init__(seed)
            self._patches.enter_context(stack.pop_all())
        self.beside = {
            Side.IMAGE: SlowExport("image", self.image.disk),
            Side.JOURNAL: SlowExport("journal", self.journal.disk),
        }

    def world_patches(self) -> list[AbstractContextManager[Any]]:
        return [
            patch.object(appliers_block, "SLOTS", (0, BLOCK_BYTES)),
            patch.object(ownership, "PLACE_BYTES", PLACE_BYTES),
            patch.object(ownership, "EXPORT_BYTES_MIN", 0),
            patch.object(Pause, "run", lambda pause, device: self._pause()),
        ]

    def _pause(self) -> None:
        if self.is_pausing:
            self.go_on(3)

    # The source.

    def applying(self, sequence: int) -> Program[None]:
        return delegation.follow(self.writer, sequence, self.watch, lambda: self.now_s)

    @property
    def has_grant(self) -> bool:
        return bool(self.writer.superblocks.current.applier)

    def kill(self) -> None:
        self.watch = Watch()
        super().kill()

    def start_over(self) -> None:
        if not self.has_grant:
            super().start_over()

    def create_again(self) -> None:
        self.kill_applier()
        super().create_again()

    def lose_power(self) -> None:
        self.follower = None
        for export in self.beside.values():
            export.break_off(self.random)
        super().lose_power()

    # The applier.

    def start_applier(self) -> None:
        """Another one has ended, or was killed so long ago that this shows."""
        if self.follower is not None:
            return
        self.is_to_end = False
        self.now_s += GONE_S + 1
        follower = self.follower_class(
            "journal",
            self.journal.size,
            self.image.size,
            number=self.random.randrange(1, 2**32),
            wall_time_ns=lambda: 0,
            clock=lambda: self.now_s,
            is_to_end=lambda: self.is_to_end,
        )
        self.follower = follower

        def ended(_: None, error: BaseException | None) -> None:
            if self.follower is follower:
                self.follower = None
            assert error is None or isinstance(error, DeviceError | JournalError), error

        start(self._life(follower), self.beside, ended)

    def _life(self, follower: Follower) -> Program[None]:
        other = yield from follower.look()
        yield from follower.announce(other)
        try:
            while not self.is_to_end:
                yield from follower.beat()
                yield from follower.step()
        except JournalError:
            yield from follower.end()
            raise
        yield from follower.end()

    def go_on(self, count: int) -> None:
        """So many requests of the applier end."""
        for _ in range(count):
            exports = [export for export in self.beside.values() if export.pending]
            if not exports:
                return
            export = self.random.choice(exports)
            export.end(self.random.randrange(len(export.pending)))

    def go_on_until_it_writes(self) -> None:
        """To the image."""
        for _ in range(WRITE_MAX):
            if any(request.sectors for request in self.beside[Side.IMAGE].pending):
                return
            self.go_on(1)

    def kill_applier(self) -> None:
        self.follower = None
        for export in self.beside.values():
            export.abandon(self.random)

    def end_applier(self) -> None:
        self.is_to_end = True
        self.go_on(WORK_MAX)

    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    def meet(self) -> None:
        """The source sees that there is an applier, and grants the newest point."""
        self.end_all()
        for _ in range(2):
            self.apply(0)
            self.end_all()
            if self.has_grant:
                return
            self.time_passes(1.5)
            self.go_on(20)
        self.apply(0)
        self.end_all()

    # What must hold.

    def check(self) -> None:
        picks: list[Callable[[list[bytes]], bytes]] = [lambda kept: kept[0], lambda kept: kept[-1]]
        picks += [self.random.choice] * self.losses
        for pick in picks:
            check_left(self, self._left(Side.IMAGE, pick), self._left(Side.JOURNAL, pick))

    def _left(self, side: Side, pick: Callable[[list[bytes]], bytes]) -> Disk:
        """What a power cut leaves, with what is in flight of both processes."""
        disk = self.exports[side].disk.copy()
        pending = self.exports[side].pending + self.beside[side].pending
        for request in self.random.sample(pending, len(pending)):
            disk.write(request.sectors)
        return disk.lose(pick)

    def recover_beside(self) -> None:
        """The source is lost, and a user recovers its newest point beside the applier. After that
        nobody writes to the image."""
        self.phase = "closed"
        for export in self.exports.values():
            export.abandon(self.random)
        found = run(read("journal", self.journal.size), self.sides())
        if found.superblock.state is State.OK and found.points:
            point = found.points[-1]
            program = recovery.recover(
                "journal",
                self.journal.size,
                self.image.size,
                wanted=str(point.sequence),
                now_ns=0,
                random_bytes=self.random.randbytes,
            )
            self.is_pausing, self.held = True, self.random.choice((0, 0, 20, 40, 60, 80))
            self.pace = self.random.choice((2, 4, 10))
            run(program, {side: BesideDevice(self, self.exports[side].disk) for side in Side})
            self.is_pausing = False
            expected = b"".join(map(content, self.cuts[point.time_ns]))
            is_right = self.image.disk.data == expected
            assert is_right, "lost: what is recovered beside an applier is not what the disk was"
            guests = b"".join(content(next(self.stamps)) for _ in self.blocks)
            self.image.disk.write(sectors_of(guests, 0))
            self.go_on(WORK_MAX)
            is_right = self.image.disk.data == guests
            assert is_right, "lost: an applier has written to an image that was recovered"
        self.kill_applier()
        self.create()
