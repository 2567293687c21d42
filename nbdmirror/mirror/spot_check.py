"""Whether a target that came back is the same disk as before (rule 40).

NBD has no name for a disk's content, so samples are compared: data that is clean, and was flushed,
is the same on both sides. Another image behind the same address, or an older one from a backup, is
detected if it differs in one of SAMPLES places. Blocks; for a helper thread.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Protocol

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.disk import Disk

SAMPLES = 32
"""Number of places. The disk's first and last granules are two of them, since partition tables and
superblocks are there."""

TRIES_MAX = 512
"""Places that are examined to find SAMPLES places with data: zeroes are the same on every disk."""

SAMPLE_BYTES_MAX = 64 << 10

DRAIN_S_MAX = 5.0
DRAIN_POLL_S = 0.01


class Tracked(Protocol):
    """What is known of the differences between disk and target: a Tracker, or Changes."""

    @property
    def dirty(self) -> DirtyBitmap:
        """What guests have changed; the same bitmap, or one that followed it."""

    @property
    def granularity(self) -> int: ...


Read = Callable[[memoryview, int], None]
"""Fill the buffer from an offset in bytes. Raises DeviceError."""


def find_mismatch(
    disk: Disk, read_target: Read, tracker: Tracked, suspects: DirtyBitmap, rng: random.Random
) -> int | None:
    """The offset in bytes of a place where the target has changed; None if no sample has.

    `suspects`: everything that may differ, as of a moment after which nothing was copied. Raises
    IO_ERRORS, from reading either side.
    """
    units = -(-disk.size // tracker.granularity)
    zeroes = 0
    samples = 0
    for number in range(min(TRIES_MAX, 2 * units)):
        unit = {0: 0, 1: units - 1}.get(number, rng.randrange(units))
        offset = unit * tracker.granularity
        length = min(tracker.granularity, disk.size - offset)
        if suspects.is_dirty(offset, length) or tracker.dirty.is_dirty(offset, length):
            continue
        here = bytearray(min(length, SAMPLE_BYTES_MAX))
        disk.pread(memoryview(here), offset)
        if not any(here):
            zeroes += 1
            if zeroes > SAMPLES // 2:
                continue
        there = bytearray(len(here))
        read_target(memoryview(there), offset)
        if here != there and _is_clean(disk, tracker, offset, length):
            return offset
        samples += 1
        if samples >= SAMPLES:
            break
    return None


def _is_clean(disk: Disk, tracker: Tracked, offset: int, length: int) -> bool:
    """Whether both sides should have been the same: no guest was writing there meanwhile."""
    deadline_s = time.monotonic() + DRAIN_S_MAX
    writes = disk.ledger.writes()
    while writes := disk.ledger.writes_left(writes):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(DRAIN_POLL_S)
    return not tracker.dirty.is_dirty(offset, length)
