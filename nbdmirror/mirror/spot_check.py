"""Whether a target that came back is the same disk as before (rule 40).

NBD has no name for a disk's content, so samples are compared: data that is clean, and was flushed,
is the same on both sides. Another image behind the same address, or an older one from a backup, is
detected if it differs in one of SAMPLES places. Blocks; for a helper thread, one at a time.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.disk import Disk

SAMPLES = 32
"""Number of places. The disk's first and last granules are two of them, since partition tables and
superblocks are there; and some that were copied lately, since an older copy differs there."""

TRIES_MAX = 512
"""Places that are examined to find SAMPLES places with data: zeroes are the same on every disk."""

SAMPLE_BYTES_MAX = 64 << 10

DIFFERED_MAX = 64
"""Places that are remembered: so many that guests do not soon change all of them."""

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


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why a target is not the one from before, in words."""

    offset: int
    """Bytes."""
    is_seen: bool = True
    """It was looked at in this attempt."""

    def __str__(self) -> str:
        if self.is_seen:
            return f"the data at {self.offset} differs: it is another disk, or an older copy"
        return (
            f"the data at {self.offset} differed before, and guests have changed the disk there "
            f"since: it may be another disk, or an older copy"
        )


class SpotCheck:
    """The comparisons of one mirror's target with the disk. What was found to differ is compared
    again at each further attempt: new places alone would let a changed target pass by chance."""

    def __init__(self) -> None:
        self._differed: list[int] = []
        """Offsets in bytes where the target that is lost differed. Empty when it is back."""

    def find_mismatch(
        self,
        disk: Disk,
        read_target: Read,
        tracker: Tracked,
        suspects: DirtyBitmap,
        rng: random.Random,
        recent: Sequence[int] = (),
    ) -> Mismatch | None:
        """Where the target has changed; None if no sample has.

        A target that has differed passes when a place that differed is equal, and none differs any
        more. If guests have changed all of these places meanwhile, nothing shows that the target is
        the one from before, and it does not pass.

        `suspects`: everything that may differ, as of a moment after which nothing was copied.
        `recent`: the offsets of granules that were copied lately. Raises IO_ERRORS, from reading
        either side."""
        pair = _Pair(disk, read_target, tracker, suspects)
        before = {offset: pair.compare(offset) for offset in self._differed}
        new = _new_mismatch(pair, rng, recent)
        found = [offset for offset, is_equal in before.items() if is_equal is False]
        if new is not None:
            found.append(new)
            if new not in before and len(before) < DIFFERED_MAX:
                self._differed.append(new)
        if found:
            return Mismatch(found[0])
        if before and not any(before.values()):
            return Mismatch(self._differed[0], is_seen=False)
        self._differed.clear()
        return None


class _Pair:
    """Disk and target."""

    def __init__(
        self, disk: Disk, read_target: Read, tracker: Tracked, suspects: DirtyBitmap
    ) -> None:
        self.granularity = tracker.granularity
        self.units = -(-disk.size // tracker.granularity)
        self._disk = disk
        self._read_target = read_target
        self._tracker = tracker
        self._suspects = suspects

    def read(self, offset: int) -> bytearray | None:
        """The disk's data in the granule at `offset`; None if it may differ from the target's."""
        length = self._length(offset)
        if any(one.is_dirty(offset, length) for one in (self._suspects, self._tracker.dirty)):
            return None
        here = bytearray(min(length, SAMPLE_BYTES_MAX))
        self._disk.pread(memoryview(here), offset)
        return here

    def is_equal(self, offset: int, here: bytearray) -> bool:
        """Whether the target has that data, or a guest has just changed the disk's."""
        there = bytearray(len(here))
        self._read_target(memoryview(there), offset)
        if here == there:
            return True
        return not _is_clean(self._disk, self._tracker, offset, self._length(offset))

    def _length(self, offset: int) -> int:
        """Bytes of the granule at `offset`."""
        return min(self.granularity, self._disk.size - offset)

    def compare(self, offset: int) -> bool | None:
        """Whether the granule at `offset` is equal on both sides; None: may be different."""
        here = self.read(offset)
        return None if here is None else self.is_equal(offset, here)


def _new_mismatch(pair: _Pair, rng: random.Random, recent: Sequence[int]) -> int | None:
    zeroes = 0
    samples = 0
    last = (pair.units - 1) * pair.granularity
    places = itertools.chain(
        (0, last, *recent),
        (rng.randrange(pair.units) * pair.granularity for _ in itertools.count()),
    )
    for offset in itertools.islice(places, min(TRIES_MAX, 2 * pair.units)):
        if (here := pair.read(offset)) is None:
            continue
        if not any(here):
            zeroes += 1
            if zeroes > SAMPLES // 2:
                continue
        if not pair.is_equal(offset, here):
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
