"""Names of disks, and default names of their jobs: each name that `serve` accepts is valid for
every command and every file of a state directory."""

from __future__ import annotations

import re
from collections.abc import Collection

from nbdmirror.errors import ConfigError

DISK_LENGTH_MAX = 200
"""A file name has 255 bytes, and files of a state directory have suffixes; a job's ID has 255
characters."""

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
