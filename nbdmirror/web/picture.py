"""A map of a disk, as the rectangles of an SVG."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from nbdmirror.cli import disk_map
from nbdmirror.cli.disk_map import Cell
from nbdmirror.web.records import Record

HEIGHT = 12
_HEIGHTS = {
    disk_map.IN_FLIGHT: HEIGHT,
    disk_map.UNFLUSHED: 6,
    disk_map.ZERO: 1,
    disk_map.CLEAN: 3,
}
"""So that who sees no colours sees the kinds. Of a dirty cell the height says how much is dirty."""


@dataclass(frozen=True, slots=True)
class Bar:
    """Adjacent cells that look the same: `x` and `width` in cells."""

    kind: str
    """A class of the style sheet."""
    x: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class DiskPicture:
    bars: list[Bar]
    width: int
    text: str
    """The same in words."""


def disk_picture(answer: Record) -> DiskPicture | None:
    """None if the answer has no map."""
    found = disk_map.picture(answer)
    if found is None:
        return None
    bars: list[Bar] = []
    x = 0
    for (kind, height), same in itertools.groupby(map(_look, found.cells)):
        width = len(list(same))
        bars.append(Bar(kind, x, width, height))
        x += width
    return DiskPicture(bars, x, found.text)


def kinds() -> list[tuple[str, str]]:
    """For a legend: classes of the style sheet, and words."""
    return [(_class(kind), kind) for kind in disk_map.KINDS]


def _look(cell: Cell) -> tuple[str, int]:
    height = _HEIGHTS.get(cell.kind) or max(2, round(cell.share * HEIGHT))
    return _class(cell.kind), height


def _class(kind: str) -> str:
    return kind.replace(" ", "-")
