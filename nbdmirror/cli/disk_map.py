"""A job's map of its disk, as a picture's cells and as words: for a terminal, and for the page.

The server's answer to x-nbdmirror-query-job-map has numbers of bytes. Here each cell gets one kind:
the first one of these that the cell has anything of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbdmirror.cli.words import size

IN_FLIGHT, DIRTY, UNFLUSHED, ZERO, CLEAN = "in flight", "dirty", "not flushed", "zeroes", "clean"
KINDS = (IN_FLIGHT, DIRTY, UNFLUSHED, ZERO, CLEAN)
_LISTS = ("lengths", "in-flight", "dirty", "unflushed", "zero")


@dataclass(frozen=True, slots=True)
class Cell:
    """`share`: the part of the cell that is dirty or in flight, from 0 to 1."""

    kind: str
    share: float


@dataclass(frozen=True, slots=True)
class Picture:
    """`text`: the same in words."""

    cells: list[Cell]
    text: str


def picture(answer: dict[str, Any]) -> Picture | None:
    """None if the answer has no map: the server is older, or the job has just ended."""
    lists = [answer.get(key) for key in _LISTS]
    if not all(isinstance(one, list) and all(map(_is_count, one)) for one in lists):
        return None
    numbers: list[list[int]] = [one for one in lists if isinstance(one, list)]
    if not numbers[0] or len({len(one) for one in numbers}) > 1:
        return None
    sums = [f"{size(sum(one))} {kind}" for kind, one in zip(KINDS[:-1], numbers[1:], strict=True)]
    text = f"{size(sum(numbers[0]))}: {', '.join(sums)}"
    return Picture([_cell(*cell) for cell in zip(*numbers, strict=True)], text)


def _is_count(one: object) -> bool:
    return type(one) is int and one >= 0


def _cell(length: int, in_flight: int, dirty: int, unflushed: int, zero: int) -> Cell:
    share = min(1.0, (in_flight + dirty) / max(1, length))
    if in_flight:
        return Cell(IN_FLIGHT, share)
    if dirty:
        return Cell(DIRTY, share)
    if unflushed:
        return Cell(UNFLUSHED, share)
    return Cell(ZERO if zero * 2 >= length else CLEAN, share)
