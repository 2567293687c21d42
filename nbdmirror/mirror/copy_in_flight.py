"""Copy: a copier's claim on its way from the source to the target, and how its end is reported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from nbdmirror.devices.base import Extent
from nbdmirror.disk.claim import Claim
from nbdmirror.mirror.buffers import PageBuffer


class Observer(Protocol):
    """Gets the results, on the loop's thread."""

    def copy_failed(self, operation: str, error: BaseException) -> None:
        """A "read" of the source or a "write" on the target failed; its range is dirty again."""

    def copy_settled(self) -> None:
        """Nothing is in flight any more: everything is clean, or the copier is stopped."""


@dataclass(slots=True, eq=False)
class Copy:
    """One claim on its way; offsets and lengths in bytes. The next piece starts at `position`;
    `pending` is the number of requests of the present piece at the target."""

    claim: Claim
    request_bytes: int
    """Largest length of one of its data requests."""
    weight: int
    """Bytes that it counts as in flight: the most that it may have."""
    buffer: PageBuffer | None = None
    """Taken when the claim has data."""
    position: int = 0
    pending: int = 0
    piece_bytes: int = 0
    """Bytes of data that are being read or written."""
    operation: str = "read"
    error: BaseException | None = None
    extents: list[Extent] = field(default_factory=list)

    def is_all_zero(self, length: int, *, is_hole: bool) -> None:
        """The claim, of `length` bytes from now on, is zeroed and not copied."""
        self.claim.is_zero = True
        self.extents = [Extent(length, zero=True, hole=is_hole)]
