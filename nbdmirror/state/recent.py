"""The last changes of a disk by guests, and a mirror's remainder (disk/remainder.py), in memory
that outlives the process. After a kill they say which parts of granules may differ from the
target.

The last changes are in RECENT_MAX entries, each with its change's number. A change takes an entry
from a queue, then a number, fills the entry, and puts it at the queue's end. So two changes never
write to one entry, and an entry is used again after all other ones. If the entry of a change N is
lost, at least RECENT_MAX - LATE_MAX later numbers are in the other entries. A kill while an entry
is filled loses its earlier change, as if it were full; the new change has not begun.

`ShmRemainder` has room for two remainders. One is written while the other one counts, and then one
store of eight bytes decides.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from itertools import chain

from nbdmirror.disk.claim import Range

REQUESTS_MAX = 4096
"""Most changing requests in progress; further ones wait. nbdkit has a thread for each."""

RECENT_MAX = 1 << 14
"""Entries of changes."""

LATE_MAX = 2 * REQUESTS_MAX + 1
"""Most entries that are not in the queue when a change puts its own there, and most that are being
filled when that one is used again, and that one."""

ENTRY = struct.Struct("QQQ")
"""Offset, length, number. Numbers begin at 1."""

RECENT_BYTES = RECENT_MAX * ENTRY.size

PARTS_MAX = 8192
"""Most parts of a remainder."""

_HEAD_CELLS = 2
_HALF_CELLS = _HEAD_CELLS + 2 * PARTS_MAX
REMAINDER_BYTES = 8 * (1 + 2 * _HALF_CELLS)


def changes_since(content: bytes, position: int) -> list[Range] | None:
    """Offset and length, in bytes, of each change in `content` whose number is at least `position`;
    None if one may be missing."""
    if len(content) != RECENT_BYTES:
        return None
    found = []
    newest = 0
    for offset, length, number in ENTRY.iter_unpack(content):
        newest = max(newest, number)
        if number >= position:
            found.append((offset, length))
    return found if newest < position + RECENT_MAX - LATE_MAX else None


class ShmRemainder:
    """A Remainder in `memory` of REMAINDER_BYTES, all zero at first. `position` is the journal's;
    `remove` removes the memory's file."""

    def __init__(
        self,
        memory: memoryview,
        position: Callable[[], tuple[int, list[Range]]],
        remove: Callable[[], None],
    ) -> None:
        self.position = position
        self.close = remove
        self._cells = memory.cast("Q")

    def put(self, position: int, parts: Sequence[Range]) -> None:
        if len(parts) > PARTS_MAX:
            self.withdraw()
            return
        half = 2 if self._cells[0] == 1 else 1
        self._fill(_start(half), array("Q", (position, len(parts), *chain.from_iterable(parts))))
        self._choose(half)

    def withdraw(self) -> None:
        self._choose(0)

    def _fill(self, start: int, content: array[int]) -> None:
        self._cells[start : start + len(content)] = content

    def _choose(self, half: int) -> None:
        self._cells[0] = half


def read_remainder(content: bytes) -> tuple[int, list[Range]] | None:
    """The position and the parts of the remainder in `content`; None if there is none."""
    if len(content) != REMAINDER_BYTES:
        return None
    cells = memoryview(content).cast("Q")
    half = cells[0]
    if half not in (1, 2):
        return None
    start = _start(half)
    position, count = cells[start : start + _HEAD_CELLS]
    if count > PARTS_MAX:
        return None
    parts = cells[start + _HEAD_CELLS : start + _HEAD_CELLS + 2 * count].tolist()
    return position, list(zip(parts[0::2], parts[1::2], strict=True))


def parts_left(
    remainder: bytes, recent: bytes, in_progress: list[Range], size: int
) -> list[Range] | None:
    """What may differ between a disk of `size` bytes and its mirror's storage after a kill; None if
    that is not known. The arguments are the contents of the memory, which an older version did not
    have, and the changes in progress."""
    if (found := read_remainder(remainder)) is None:
        return None
    position, parts = found
    if (changes := changes_since(recent, position)) is None:
        return None
    # An entry that was being filled may have the range of two changes.
    every = (*parts, *changes, *in_progress)
    return [(start, min(length, size - start)) for start, length in every if start < size]


def _start(half: int) -> int:
    return 1 + (half - 1) * _HALF_CELLS
