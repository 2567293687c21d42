"""Results: how the last job of a disk ended, in memory and in a state directory.

Results are only shown to users, so a file that cannot be read is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

from nbdmirror.state.json_record import FLAG, NUMBER, TEXT, Key, OrNull, dump, load, one_of
from nbdmirror.state.sealed_files import seal, unseal

KIND = "last"


@dataclass(frozen=True, slots=True)
class Result:
    """How a job ended."""

    job: Annotated[str, Key("job", TEXT)]
    target: Annotated[str, Key("target", TEXT)]
    result: Annotated[str, Key("result", one_of("completed", "cancelled", "failed"))]
    pivoted: Annotated[bool, Key("pivoted", FLAG)]
    reason: Annotated[str, Key("reason", TEXT)]
    """Why it did not end well; else empty."""
    ended_at_s: Annotated[float, Key("ended_at_s", NUMBER)]
    """Seconds since 1970."""
    pause_s: Annotated[float | None, Key("pause_s", OrNull(NUMBER))]
    sync: Annotated[str, Key("sync", TEXT)] = ""
    """The job's sync mode; "" if it is not known."""

    def to_bytes(self) -> bytes:
        """NAME.last."""
        return seal(KIND, dump(self))

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises StateError."""
        return load(cls, unseal(KIND, content))
