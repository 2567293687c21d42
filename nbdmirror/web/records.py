"""A server's answer, as far as it can be understood: servers differ in age, and a socket may be
another program's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]
Key = tuple[str, str, str]
"""A job: its server, its disk, its name."""


@dataclass(frozen=True, slots=True)
class Report:
    """A server's status as of `time_s`, in seconds since 1970, or the reason why there is none."""

    socket: str
    time_s: float
    status: Record = field(default_factory=dict)
    """Of x-nbdmirror-query-status."""
    error: str = ""
    maps: dict[str, Record] = field(default_factory=dict)
    """Answers to x-nbdmirror-query-job-map, by the jobs' names; not all jobs have one, and not each
    is of now."""
    asked_s: float = 0.0
    """`time_s` by a monotonic clock. Lags may have grown since then."""

    @property
    def disks(self) -> list[Record]:
        return records(self.status, "disks")

    def jobs(self, disk: Record) -> list[tuple[Key, Record]]:
        """Of one of the disks."""
        name = str(disk.get("name", ""))
        return [
            ((self.socket, name, str(job.get("device", ""))), job) for job in records(disk, "jobs")
        ]

    def age(self, now_s: float) -> Record:
        """How old the status is at most, as a member of it."""
        return {} if self.error else {"age-s": round(max(0.0, now_s - self.asked_s), 3)}

    @property
    def as_json(self) -> Record:
        """As `nbdmirror list --json` has it."""
        what = {"error": self.error} if self.error else self.status
        return {"qmp": self.socket, **what}


def records(owner: Record, key: str) -> list[Record]:
    """The objects in a list that is there. Empty where there is none."""
    found = owner.get(key)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def member(owner: Record, key: str) -> Record:
    """The object that is there. Empty where there is none."""
    found = owner.get(key)
    return found if isinstance(found, dict) else {}


def is_well(job: Record) -> bool:
    """It was not stopped by an error, and its far side is there."""
    is_lost = False in (job.get("target-connected"), job.get("journal-connected"))
    return job.get("io-status", "ok") == "ok" and not is_lost


def number(value: Any) -> float | None:
    """A bool is one; text is none, and neither is what no double can hold."""
    try:
        return float(value) if isinstance(value, bool | int | float) else None
    except OverflowError:
        return None


def plain(value: Any) -> Any:
    """JSON without what not all of its readers can read: half characters, as in the name of a file
    that is not UTF-8, and numbers that are none."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items()}
    return value
