"""Areas: the disk in PLACES areas: when the copier was in each, and what became dirty there since.

On the event loop's thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from nbdmirror.disk.bitmap import CELL_SHIFTS, DirtyBitmap
from nbdmirror.mirror.area import Area, Change
from nbdmirror.mirror.hot_last import HotLast

PLACES = 64


class Areas:
    """The areas of one disk."""

    def __init__(self, dirty: DirtyBitmap) -> None:
        granules = -(-dirty.size // dirty.granularity)
        self._shift = next(bits for bits in CELL_SHIFTS if not bits or granules >> bits >= PLACES)
        units, unit = -(-granules >> self._shift), dirty.granularity << self._shift
        count = max(1, min(PLACES, units))
        edges = [index * units // count * unit for index in range(count)]
        ends = [*edges[1:], dirty.size]
        self.places = [
            Area(start, end - start, dirty.granularity)
            for start, end in zip(edges, ends, strict=True)
        ]
        self._dirty = dirty
        self._ends = ends
        self._cursor, self._cursor_s = 0, math.nan
        self._entered_s = math.nan
        """When the copier entered the place that it is in."""

    @property
    def here(self) -> int:
        """The place that the copier is in."""
        return sum(end <= self._cursor for end in self._ends[:-1])

    def forget(self) -> None:
        """Guests are not all who have made something dirty."""
        for place in self.places:
            place.forget()

    def start_over(self) -> None:
        """The copier does not work now."""
        self._cursor_s = math.nan

    def moved(self, now_s: float, cursor: int, hot: HotLast | None) -> None:
        """The copier went on to `cursor`, perhaps past the disk's end and on from its start."""
        if math.isnan(self._cursor_s):
            self._entered_s = now_s
        elif cursor != self._cursor:
            self._pass(now_s, cursor, hot)
        self._cursor, self._cursor_s = cursor, now_s

    def _pass(self, now_s: float, cursor: int, hot: HotLast | None) -> None:
        before, since_s, size = self._cursor, self._cursor_s, self._dirty.size
        is_around = cursor < before
        way = cursor - before + (size if is_around else 0)
        held = hot.held if hot is not None else None
        last = len(self._ends) - 1
        passed = [(end, i) for i, end in enumerate(self._ends) if end > before and i < last]
        if is_around:
            passed += [(size, last)]
            passed += [(end + size, i) for i, end in enumerate(self._ends) if i < last]
        for end, index in passed:
            if end - before > way:
                break
            left_s = since_s + (now_s - since_s) * (end - before) / max(1, way)
            place = self.places[index]
            left_out = held.bytes_in(place.start, place.length) if held is not None else 0
            place.take((self._entered_s + left_s) / 2, left_out)
            self._entered_s = left_s

    def dirty_bytes(self) -> list[int]:
        """Of each place. What was not touched since the last call is not counted again."""
        if not self._dirty.dirty_granules:  # counts what was touched
            return [0] * len(self.places)
        return self._dirty.bytes_in_cells(self._ends, self._shift)

    def look(self, now_s: float) -> Iterator[Change]:
        """What became dirty everywhere, but for the place that the copier is in."""
        here = self.places[self.here]
        for place, dirty in zip(self.places, self.dirty_bytes(), strict=True):
            if place is not here and place.taken_s is not None:
                change = place.look(now_s, dirty)
                if change is not None:
                    yield change
