"""Names of disks, default names of their jobs, and names of points. Each name of a disk that
`serve` accepts is valid for every command and every file of a state directory. Each name of a point
is told apart from a point's number and from a time."""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import datetime

from nbdmirror.errors import ConfigError

DISK_LENGTH_MAX = 200
"""A file name has 255 bytes, and files of a state directory have suffixes; a job's ID has 255
characters."""

POINT_BYTES_MAX = 255
"""Of a point's name, in UTF-8: the room that a journal has."""

DISK_RULE = (
    f"a disk's name begins with a letter or digit and has letters, digits, '.', '_' and '-', "
    f"{DISK_LENGTH_MAX} at most"
)

_DISK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


def split_disk(text: str) -> tuple[str, str]:
    """The name, or "", and the disk of a [NAME=]DISK. A URI never looks like a name with a disk:
    the text before its first '=' has a ':'."""
    name, equals, disk = text.partition("=")
    return (name, disk) if equals and _DISK.fullmatch(name) else ("", text)


def name_disk(text: str, index: int) -> tuple[str, str]:
    """The name and the disk of a [NAME=]DISK. The default name is disk0, disk1 and so on, by the
    disk's `index`. Raises ConfigError."""
    name, disk = split_disk(text)
    if not disk:
        raise ConfigError(f"'{text}' names no disk")
    if len(name) > DISK_LENGTH_MAX:
        raise ConfigError(f"{text[:40]}...: the name is too long: {DISK_RULE}")
    return name or f"disk{index}", disk


def is_wellformed_id(text: str) -> bool:
    """QEMU's rule for the names of jobs and of nodes (id_wellformed)."""
    return bool(_ID.fullmatch(text))


def default_job_id(disk: str, disks: Collection[str]) -> str:
    """The default ID of a disk's job: the disk's name. If a job cannot have that name, `job-` is
    put before it, repeatedly until no other disk has that name."""
    job = disk
    while not is_wellformed_id(job) or (job != disk and job in disks):
        job = f"job-{job}"
    return job


def check_point_name(name: str) -> None:
    """Raise ConfigError unless a point can have this name."""
    if not name:
        raise ConfigError("a point's name must not be empty")
    if not name.isprintable() or name != name.strip():
        text = f"{name!r} has characters that cannot be printed, or spaces at an end"
        raise ConfigError(f"{text}: a point cannot have this name")
    if (length := len(name.encode())) > POINT_BYTES_MAX:
        text = f"{name[:40]}...: a point's name has at most {POINT_BYTES_MAX} bytes"
        raise ConfigError(f"{text}, and this one has {length}")
    for what, is_one in (("number", is_number(name)), ("time", parse_time(name) is not None)):
        if is_one:
            raise ConfigError(f"'{name}' is a {what}: a point's name must not look like one")


def is_number(text: str) -> bool:
    """Whether a user means a point's number."""
    return text.isascii() and text.isdecimal()


def parse_time(text: str) -> int | None:
    """Nanoseconds since 1970 of a date and time in ISO 8601, local if it names no zone."""
    try:
        # Whole microseconds: a point's time, as it is shown, must name the point.
        return round(datetime.fromisoformat(text).timestamp() * 10**6) * 1000
    except (ValueError, OverflowError, OSError):
        return None
