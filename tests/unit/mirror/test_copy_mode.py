"""The switch of the copy mode: what it says of guests' writes holds from that moment on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.tracker import Tracker
from nbdmirror.mirror.copy_mode import CopyModeSwitch

SIZE, GRANULE = 1 << 20, 4096


class Interrupted(Tracker):
    """Something happens right before, or right after, the look at what is dirty."""

    before: Callable[[], None] = staticmethod(lambda: None)
    after: Callable[[], None] = staticmethod(lambda: None)

    @property
    def in_sync(self) -> bool:
        self.before()
        found = super().in_sync
        self.after()
        return found


@pytest.mark.parametrize("moment", ["before", "after", "much earlier"])
def test_a_last_write_of_the_old_mode_beside_the_look(moment: str) -> None:
    """Actively synced means that nothing is dirty, and that nothing gets dirty."""
    disk, tracker = Disk("vda", MemoryDevice(SIZE)), Interrupted(SIZE, GRANULE)
    mode = CopyModeSwitch(
        disk=disk,
        tracker=tracker,
        target=MemoryDevice(SIZE),
        whole_granules=False,
        on_error=lambda error: None,
    )
    disk.ledger.attach(tracker.dirty)
    token = disk.ledger.enter()
    mode.turn(synchronous=True)

    def ends() -> None:
        tracker.before = tracker.after = lambda: None
        disk.ledger.leave(token, 0, 512)

    if moment == "much earlier":
        ends()
    else:
        setattr(tracker, moment, ends)
    mode.is_in_sync()
    assert tracker.dirty.is_dirty(0, 512) and not mode.is_actively_synced
    while claim := tracker.claim(0, SIZE):
        tracker.settle(claim, failed=False)
    assert mode.is_in_sync() and mode.is_actively_synced
