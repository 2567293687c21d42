"""Claim: the part of a disk that one copy or one synchronous write owns."""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[int, int]
"""Offset and length, in bytes."""


@dataclass(slots=True, eq=False)
class Claim:
    """A range of whole granules (the disk's odd end included) that one copy or one synchronous
    write owns, even if only parts of it are copied. In bytes."""

    offset: int
    length: int
    progress: int = 0
    """Of a synchronous write: the bytes that count as done at its end, which are those that were
    written. Of a copy: the bytes that have been counted."""
    parts: tuple[Range, ...] | None = None
    """The parts to copy, ascending and not adjacent; None: all of the range."""
    is_zero: bool = False
    """All of the range is zeroed on the target."""

    @property
    def end(self) -> int:
        """The offset after the last byte."""
        return self.offset + self.length

    @property
    def bytes_to_copy(self) -> int:
        """Bytes in the parts to copy."""
        return self.length if self.parts is None else sum(length for _, length in self.parts)

    def overlaps(self, other: Claim) -> bool:
        """Whether both ranges share a byte."""
        return self.offset < other.end and other.offset < self.end

    def parts_in(self, start: int, end: int) -> tuple[Range, ...]:
        """The parts to copy between two offsets."""
        if self.parts is None:
            return ((start, end - start),) if start < end else ()
        cut = ((max(start, at), min(end, at + length)) for at, length in self.parts)
        return tuple((first, last - first) for first, last in cut if first < last)

    def next_part(self, position: int) -> int:
        """The first offset at or after `position` that is to be copied; the end if there is
        none."""
        if self.parts is None:
            return position
        return next((max(at, position) for at, n in self.parts if position < at + n), self.end)

    def shrink(self, length: int) -> tuple[Range, ...]:
        """Keep only the first `length` bytes. Returns the parts to copy of the rest."""
        rest = self.parts_in(self.offset + length, self.end)
        if self.parts is not None:
            self.parts = self.parts_in(self.offset, self.offset + length)
        self.length = length
        return rest


def joined(parts: tuple[Range, ...], gap_bytes: int) -> tuple[Range, ...]:
    """`parts`, with clean gaps of at most `gap_bytes` included."""
    if len(parts) < 2:
        return parts
    found = [parts[0]]
    for offset, length in parts[1:]:
        if offset - sum(found[-1]) <= gap_bytes:
            found[-1] = (found[-1][0], offset + length - found[-1][0])
        else:
            found.append((offset, length))
    return tuple(found)
