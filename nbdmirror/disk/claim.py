"""Claim: what of a disk one copy or one synchronous write owns."""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[int, int]
"""Offset and length, in bytes."""


@dataclass(slots=True, eq=False)
class Claim:
    """A range of whole granules (the disk's odd end included) that one copy or one synchronous
    write owns, also where only parts of it are copied. Bytes."""

    offset: int
    length: int
    progress: int = 0
    """Bytes of a synchronous write that count as done at its end: those that were written. Of a
    copy, those that have counted."""
    parts: tuple[Range, ...] | None = None
    """What of it is to be copied, ascending and apart from each other; None: all."""

    @property
    def end(self) -> int:
        return self.offset + self.length

    def overlaps(self, other: Claim) -> bool:
        return self.offset < other.end and other.offset < self.end

    def parts_in(self, start: int, end: int) -> tuple[Range, ...]:
        """What is to be copied between two offsets."""
        if self.parts is None:
            return ((start, end - start),) if start < end else ()
        cut = ((max(start, at), min(end, at + length)) for at, length in self.parts)
        return tuple((first, last - first) for first, last in cut if first < last)

    def shrink(self, length: int) -> tuple[Range, ...]:
        """Keep only the first `length` bytes. Returns what of the rest was to be copied."""
        rest = self.parts_in(self.offset + length, self.end)
        if self.parts is not None:
            self.parts = self.parts_in(self.offset, self.offset + length)
        self.length = length
        return rest


def joined(parts: tuple[Range, ...], gap_bytes: int) -> tuple[Range, ...]:
    """`parts` with clean gaps of up to so many bytes filled."""
    if len(parts) < 2:
        return parts
    found = [parts[0]]
    for offset, length in parts[1:]:
        if offset - sum(found[-1]) <= gap_bytes:
            found[-1] = (found[-1][0], offset + length - found[-1][0])
        else:
            found.append((offset, length))
    return tuple(found)
