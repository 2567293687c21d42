"""Results: how the last job of a disk ended, as it is remembered, and kept in a state directory.

Nothing depends on it but what people are told: a file that cannot be read is forgotten.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Self

from nbdmirror.statefile import StateError, seal, unseal

KIND = "last"


@dataclass(frozen=True, slots=True)
class Result:
    """How a job ended."""

    job: str
    target: str
    result: str
    """"completed", "cancelled" or "failed"."""
    pivoted: bool
    reason: str
    """Why it did not end well; else empty."""
    ended_at_s: float
    """Seconds since 1970."""
    pause_s: float | None

    def to_bytes(self) -> bytes:
        """NAME.last."""
        return seal(KIND, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises StateError."""
        try:
            return cls(**json.loads(unseal(KIND, content)))
        except (ValueError, TypeError) as error:
            raise StateError(f"makes no sense: {error}") from error
