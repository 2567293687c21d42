"""A world of points (cutworld.py) that is kept in a state directory, and may end at any moment.

After each step a kill and a power cut are looked at, as in powerloss.py. What may differ from the
last committed point must be told: by the frozen set, what is dirty, and the intents. The far side
has each committed point on its storage, and may be ahead of a source that lost its cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from hypothesis.stateful import precondition, rule
from model import choices as st
from model.cutmachine import GUESTS_MAX, CutMachine, slots
from model.cutparts import FiberDisk, FiberLedger
from model.cutworld import GRANULE, CutWorld
from model.powerloss import (
    BOUNDS,
    DISK,
    KEY,
    PowerCuts,
    SimFolder,
    SimSlots,
    StepWriter,
    begun_store,
)
from support.staterecords import MIRROR

from nbdmirror.devices.base import BlockDevice
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.changes import Changes
from nbdmirror.state.disk_file import DiskIdentity
from nbdmirror.state.journal import ranges_left
from nbdmirror.state.journaled_disk import JournaledDisk
from nbdmirror.state.recovery import RecoveredState, names


class PowerDisk(JournaledDisk, FiberDisk):
    """A disk whose guests note each change, and pause."""

    def __init__(self, source: BlockDevice, ledger: FiberLedger) -> None:
        FiberDisk.__init__(self, source, ledger)


class CutPowerWorld(CutWorld):
    disk_class = PowerDisk
    flushes_source = True

    def __init__(self, content: bytes, **options: Any) -> None:
        super().__init__(content, **options)
        for value in BOUNDS:
            self._patches.enter_context(patch.object(*value))
        self.durable_source = bytearray(content)
        self.folder = SimFolder()
        self.writer = StepWriter(self.loop.call_later)
        self.identity = DiskIdentity(DISK.source, self.size)
        self.store = begun_store(self.folder, self.identity, self.writer, self.flush_source)
        self.power_cuts = PowerCuts(self.identity, self.recover)
        disk: Any = self.disk
        disk.journal = self.store.journal
        record = replace(MIRROR, key=KEY, granularity=GRANULE)
        self.store.keep_mirror(record, {KEY: self.changes})

    def flush_source(self) -> None:
        if self.flushes_source:
            self.durable_source[:] = self.source

    def check(self) -> None:
        super().check()
        killed = self.changes.may_differ()
        for offset, length in ranges_left(bytes(self.store.journal._cells.cast("B"))):
            killed.mark(offset, length)
        self._check_told(killed, [self.source], "a killed process")
        for log in self.folder.logs[names("disk")["intents"]].after_power_cut():
            self._check_power_cut(log)

    def _check_power_cut(self, log: SimSlots) -> None:
        dirty = self.power_cuts.told(self.folder.files, log)
        if dirty is not None:
            self._check_told(dirty, [self.source, self.durable_source], "a power cut")

    def recover(self, found: RecoveredState) -> DirtyBitmap:
        dirty = DirtyBitmap(self.size, GRANULE)
        found.restore(dirty, KEY)
        return dirty

    def _check_told(self, dirty: DirtyBitmap, sources: list[bytearray], what: str) -> None:
        """`sources`: what the disk may hold, in each of its parts, after `what`."""
        for offset in range(0, self.size, GRANULE):
            granule = slice(offset, min(offset + GRANULE, self.size))
            contents = {bytes(one[granule]) for one in (*sources, self.far)}
            assert len(contents) == 1 or dirty.is_dirty(offset, 1), (
                f"lost in {what}: the granule at {offset}"
            )


class CutPowerMachine(CutMachine):
    world_class: type[CutWorld] = CutPowerWorld

    @rule(
        action=st.sampled_from(("write", "checkpoint", "checkpoint", "flush")),
        steps=st.integers(0, 3),
    )
    def state_is_kept(self, action: str, steps: int) -> None:
        world = self.w
        assert isinstance(world, CutPowerWorld)
        if action == "checkpoint":
            world.store._checkpoints.tick()
        elif action == "flush":
            world.flush_source()
        for _ in range(steps):
            world.writer.step()
            world.check()

    @precondition(lambda self: len(self.w.under_way) < GUESTS_MAX)
    @rule(granule=slots, rounds=st.integers(1, 3))
    def a_committed_write_leaves_the_log(self, granule: int, rounds: int) -> None:
        """Once the disk has it on its storage."""
        world = self.w
        assert isinstance(world, CutPowerWorld)
        self._go_on(self._ask("pwrite", granule, 0, GRANULE), 30)
        self._cut(2)
        if world.points.view is not None:
            self._send_all()
            world.commit()
        for _ in range(rounds):
            world.store._checkpoints.tick()
            while world.writer.calls:
                world.writer.step()
                world.check()
            world.loop.turn()


class LeavesTheDiskUnflushed(CutPowerWorld):
    """A power cut takes back what the far side has: the region must stay until the disk is
    flushed."""

    flushes_source = False


class SavesDirtyAlone(CutPowerWorld):
    """The point in progress is not committed, and not dirty any more."""

    class changes_class(Changes):
        def may_differ(self) -> DirtyBitmap:
            return self.dirty.copy()


class ForgetsABrokenPoint(CutPowerWorld):
    """Nor is one that was broken."""

    class changes_class(Changes):
        def broken(self) -> None:
            self.committed()


CUT_POWER_MUTANTS = (LeavesTheDiskUnflushed, SavesDirtyAlone, ForgetsABrokenPoint)
