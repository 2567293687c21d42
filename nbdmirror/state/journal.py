"""Journal: what guests are about to change, noted before the change, for the start after a crash.

A mark in a bitmap comes after the write (point 1 of ledger.py), so a crash between the two would
leave a granule that differs and is clean. Therefore each changing request notes its range in two
other places first:

 - `Journal`, in memory that outlives the process: the exact ranges of the requests in progress, and
   of the last ones (recent.py). After `kill -9` only the former, and the bitmaps, may differ; the
   latter say which parts of the bitmaps' granules.
 - `Regions`, on disk: the regions (1 to 64 MiB) in which bitmaps on disk may be behind those in
   memory. After a power cut only these, and the bitmaps on disk, may differ. A region is on disk
   before the first write to it is issued; further writes to it cost nothing.

A region leaves the log when, after the last write to it, the disk has been flushed and the bitmaps
have been saved. In order: `cut`, then wait until `has_drained`, then flush, read the bitmaps, save
them, then `retire`. A write that took its slot before the cut is waited for, so its mark is saved.
A write that took its slot later checks the region afterwards, and touches it again. Without the
flush a power cut could take back a write that the target already has.

Guests' threads call `begin` and `end`; the store calls the rest.
"""

from __future__ import annotations

import itertools
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable

from nbdmirror.disk.claim import Range
from nbdmirror.state.intent_log import SLOTS, IntentLog, region_bytes, region_count
from nbdmirror.state.recent import ENTRY, RECENT_MAX, REQUESTS_MAX
from nbdmirror.state.sealed_files import Slots

CROWD_PAUSE_S = 0.001

JOURNAL_BYTES = REQUESTS_MAX * 16

UNUSED = (1 << 64) - 1
"""Offset in a slot that was not used since the last `forget_done`."""

TAKEN_MAX = REQUESTS_MAX // 2
"""Most slots that `forget_done` takes; guests cannot use them meanwhile."""


_fill = ENTRY.pack_into


class Journal:
    """The changing requests in progress, in `memory` of JOURNAL_BYTES, and the last ones, in
    `recent` of RECENT_BYTES. `ranges_left` and `recent.changes_since` read the memory of an earlier
    process."""

    def __init__(self, memory: memoryview, recent: memoryview) -> None:
        self.regions: Regions | None = None
        """Set while a bitmap of the disk must survive a power cut."""
        self._cells = memory.cast("Q")  # offset and length by turns; length 0: unused
        offsets = self._cells[0::2]
        offsets[:] = array("Q", [UNUSED]) * len(offsets)
        self._free = list(range(REQUESTS_MAX))
        self._number_of = [0] * REQUESTS_MAX
        """By slot: the number of its last change."""
        self._numbers = itertools.count(1)
        self._recent = recent
        self._entries = deque(range(0, RECENT_MAX * ENTRY.size, ENTRY.size))
        """Where an entry begins, the oldest one first."""
        self._forgotten_at = -1
        """The oldest entry when all changes were forgotten; a change takes it."""

    def begin(self, offset: int, length: int) -> int:
        """A change of the range, in bytes, is about to be issued. Returns the slot for `end`."""
        while True:
            try:
                slot = self._free.pop()
                break
            except IndexError:
                time.sleep(CROWD_PAUSE_S)
        cells = self._cells
        cells[2 * slot] = offset
        cells[2 * slot + 1] = length
        entry = self._entries.popleft()
        # The slot before the number: `position` takes a number, and reads the slots afterwards.
        self._number_of[slot] = number = next(self._numbers)
        _fill(self._recent, entry, offset, length, number)
        self._entries.append(entry)
        regions = self.regions
        if regions is not None and length:
            first = offset >> regions.shift
            last = (offset + length - 1) >> regions.shift
            if first != last or not regions.touched[first]:
                regions.touch(first, last)
        return slot

    def end(self, slot: int) -> None:
        """The change is done, or has failed, and is marked."""
        self._cells[2 * slot + 1] = 0
        self._free.append(slot)

    def forget_done(self) -> None:
        """Forget finished changes, so that the memory shows whether a change came later
        (`is_untouched`). From one thread at a time. If guests are too busy to forget everything,
        the memory shows a change."""
        if self.is_forgotten:
            return
        oldest = self._entries[0]
        taken: list[int] = []
        offsets = self._cells[0::2].tolist()
        left = len(offsets) - offsets.count(UNUSED)  # and those under way
        while left and len(taken) < TAKEN_MAX:
            try:
                slot = self._free.pop()  # guests write only to their slots
            except IndexError:
                break
            taken.append(slot)
            if self._cells[2 * slot] != UNUSED:
                self._cells[2 * slot] = UNUSED
                left -= 1
        self._free.extend(reversed(taken))
        self._forgotten_at = -1 if left else oldest

    @property
    def is_forgotten(self) -> bool:
        """All changes were forgotten, and none has begun since."""
        return self._entries[0] == self._forgotten_at

    def under_way(self) -> dict[int, int]:
        """The changes in progress, for `has_drained`."""
        lengths = self._cells[1::2].tolist()
        return {slot: self._number_of[slot] for slot, length in enumerate(lengths) if length}

    def position(self) -> tuple[int, list[Range]]:
        """A number, and ranges: each change with a lower number is in progress, and in one of the
        ranges, or has ended, and is marked."""
        return next(self._numbers), _in_progress(self._cells)

    def has_drained(self, before: dict[int, int]) -> bool:
        """Whether all changes of `before` have ended."""
        return not any(
            self._cells[2 * slot + 1] and self._number_of[slot] == number
            for slot, number in before.items()
        )


def ranges_left(content: bytes) -> list[Range]:
    """Offset and length, in bytes, of each change in progress when the process ended."""
    return _in_progress(memoryview(content).cast("Q"))


def _in_progress(cells: memoryview) -> list[Range]:
    values = cells.tolist()
    ranges = zip(values[0::2], values[1::2], strict=True)
    return [(offset, length) for offset, length in ranges if length]


def is_untouched(content: bytes) -> bool:
    """Whether no change began, or was in progress, after the last `forget_done`."""
    offsets = memoryview(content).cast("Q")[0::2].tolist()
    return offsets.count(UNUSED) == len(offsets)


class Regions:
    """The log of write intents of one disk."""

    def __init__(
        self,
        *,
        disk_id: str,
        size: int,
        slots: Slots,
        clock: Callable[[], float],
        on_error: Callable[[OSError], None],
        log: IntentLog | None = None,
        is_anywhere: bool = False,
    ) -> None:
        """`slots` is the file. `log` is its content; if unknown (None), the file counts as empty,
        or as full if `is_anywhere`. `clock`: seconds since 1970. `on_error` is called on a guest's
        thread when the log cannot be written; until it can, it is out of date."""
        self.shift = region_bytes(size).bit_length() - 1
        self.touched = bytearray(region_count(size))
        """One byte for each region: 1 if it is on disk and was written to since the last cut."""
        self.error: OSError | None = None
        self._before = bytearray(len(self.touched))
        unknown = (b"\1" if is_anywhere else b"\0") * len(self.touched)
        self._on_disk = bytearray(log.regions if log else unknown)
        self._sequence = log.sequence if log else 0
        self._wanted = bytearray(len(self.touched))
        self._is_writing = False
        self._changed = threading.Condition()
        self._slots = slots
        self._disk_id = disk_id
        self._size = size
        self._clock = clock
        self._on_error = on_error

    def start(self) -> None:
        """Write both slots, so that neither has older content. Raises OSError."""
        for _ in range(SLOTS):
            log = self._next_log(bytes(self._on_disk))
            self._slots.write(log.sequence % SLOTS, log.to_bytes(), sync=True)

    def touch(self, first: int, last: int) -> None:
        """Return when these regions are on disk. Threads that come together share one write."""
        span = slice(first, last + 1)
        with self._changed:
            if 0 in self._on_disk[span]:
                self._wanted[span] = b"\1" * (last + 1 - first)
                while 0 in self._on_disk[span]:
                    if self._is_writing:
                        self._changed.wait()
                    else:
                        wanted, self._wanted = self._wanted, bytearray(len(self._wanted))
                        # Another thread may have written these, and a `retire` come before this
                        # thread ran again.
                        wanted[span] = b"\1" * (last + 1 - first)
                        self._write(_either(self._on_disk, wanted), sync=True)
            self.touched[span] = b"\1" * (last + 1 - first)

    def cut(self) -> None:
        """Begin a new period of noting which regions are written to."""
        with self._changed:
            self._before, self.touched = self.touched, bytearray(len(self.touched))

    @property
    def was_touched(self) -> bool:
        """Whether any region was written to between the last two cuts."""
        return 1 in self._before

    @property
    def is_empty(self) -> bool:
        """No region is in the log: no guest has changed anything since the last save."""
        return 1 not in self._on_disk and self.error is None

    @property
    def may_retire(self) -> bool:
        """Whether `retire` would remove a region from the log."""
        return _either(self._before, self.touched) != self._on_disk

    def retire(self) -> None:
        """The disk was flushed after the last cut, and the bitmaps of that moment are saved:
        regions that were not touched since the cut before it leave the log. (One cut would be
        enough. With two, a region that is written to regularly is not written to the log each
        time.)"""
        with self._changed:
            while self._is_writing:
                self._changed.wait()
            kept = _either(self._before, self.touched)
            if kept != self._on_disk or self.error is not None:
                # Set this first: a guest that misses its region writes the log later, and wins.
                self._on_disk = kept
                self._write(kept, sync=self.error is not None)

    def close(self) -> None:
        self._slots.close()

    def _next_log(self, regions: bytes) -> IntentLog:
        self._sequence += 1
        return IntentLog(self._disk_id, self._size, self._sequence, self._clock(), regions)

    def _write(self, regions: bytearray, *, sync: bool) -> None:
        """Write the log. `_changed` is held, and released meanwhile. A log that cannot be written
        ends no guest's I/O: the error is reported, and the log counts as written."""
        log = self._next_log(bytes(regions))
        self._is_writing = True
        self._changed.release()
        error: OSError | None = None
        try:
            self._slots.write(log.sequence % SLOTS, log.to_bytes(), sync=sync)
        except OSError as caught:
            error = caught
        finally:
            self._changed.acquire()
            self._is_writing = False
            self._changed.notify_all()
        if error is not None and self.error is None:
            self._on_error(error)
        self.error = error
        self._on_disk = _either(self._on_disk, regions)


def _either(one: bytearray, other: bytearray) -> bytearray:
    union = int.from_bytes(one, "little") | int.from_bytes(other, "little")
    return bytearray(union.to_bytes(len(one), "little"))
