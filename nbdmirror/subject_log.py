"""Log lines about one disk or one job. Each line begins with the subject's name; where the log is
JSON (logs.py) it has the name as a member too, beside other members that the line is given."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any


class SubjectLog(logging.LoggerAdapter[logging.Logger]):
    """Logs lines with `about={...}`: further members of the line where the log is JSON."""

    def __init__(self, subject: str, members: dict[str, object]) -> None:
        super().__init__(logging.getLogger("nbdmirror"), members)
        self._subject = subject.replace("%", "%%")
        self._members = members

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[str, MutableMapping[str, Any]]:
        about = self._members | kwargs.pop("about", {})
        return f"{self._subject}: {msg}", {**kwargs, "extra": {"about": about}}


def disk_log(disk: str) -> SubjectLog:
    return SubjectLog(f"disk {disk}", {"device": disk})


def job_log(job: str, disk: str) -> SubjectLog:
    return SubjectLog(f"job {job}", {"job": job, "device": disk})
