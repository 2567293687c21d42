"""Copy: a copier's claim on its way from the source to the target."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdmirror.devices.base import Extent
from nbdmirror.disk.claim import Claim
from nbdmirror.mirror.buffers import PageBuffer


@dataclass(slots=True, eq=False)
class Copy:
    """One claim on its way. `position` is where the next piece starts; `pending` counts the
    requests of this piece on the target."""

    claim: Claim
    request_bytes: int
    """The most of its data that is one request."""
    weight: int
    """Bytes for which it counts among those in flight: the most that it may have."""
    buffer: PageBuffer | None = None
    """Taken when there is data."""
    position: int = 0
    pending: int = 0
    piece_bytes: int = 0
    """Of data, being read or written."""
    operation: str = "read"
    error: BaseException | None = None
    extents: list[Extent] = field(default_factory=list)
