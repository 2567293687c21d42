"""What is remembered of a disk's file: which one it is, and when it was changed last.

Device numbers are of one boot. At the next one, or when its file system is mounted again, a file
may have another number, and its old number may be another's: so of two boots the inode and the id
of the file system count. Not every file system has an id that stays (that of XFS and FAT is the
device's number, network file systems have none): then it cannot be known.

Times of change come from the clock of the file's own system, which may not be ours, and which may
have been set meanwhile. So they are compared first of all with times of the same file.
"""

from __future__ import annotations

import functools
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nbdmirror.identity import Same, same_place
from nbdmirror.layers import layers_of, layers_of_device, share_storage
from nbdmirror.state.json_record import COUNT, TEXT, Key
from nbdmirror.state.sealed_files import StateError

ALIVE_SLACK_S = 3.0
"""A disk that was changed later than this after its server was last alive was changed by somebody
else. The server notes four times a second that it lives, unless the machine is busy."""

SEEN_SLACK_S = 3.0
"""A change that the server itself made after it last looked is not older than that look by more
than this. File systems have times of 2 s (FAT), and their clock is some milliseconds late."""

SAVED_SLACK_S = 60.0
"""As ALIVE_SLACK_S after a power cut, where what is known is when bitmaps or intents were last
saved."""

_ALIVE = struct.Struct("d")
_SEEN = struct.Struct("dq")
_IS_EXACT = struct.Struct("?")
ALIVE_BYTES = _ALIVE.size + _SEEN.size + _IS_EXACT.size

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def boot_id() -> str:
    """Of the running kernel; "" if it does not tell."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class DiskIdentity:
    """A disk as it can be told from others. Files and block devices; what has none of this is told
    by its name and size alone."""

    source: Annotated[str, Key("source", TEXT)]
    size: Annotated[int, Key("size", COUNT)]
    """The disk's; the file may be larger."""
    device: Annotated[int, Key("device", COUNT)] = 0
    inode: Annotated[int, Key("inode", COUNT)] = 0
    boot: Annotated[str, Key("boot", TEXT)] = ""
    """In which `device` is good. "" in records of older versions."""
    filesystem: Annotated[str, Key("filesystem", TEXT)] = ""
    """Its id (statvfs), hexadecimal; "" if it has none."""
    number: Annotated[int, Key("number", COUNT)] = 0
    """A block device's, which all of its nodes have; as good as `device`."""

    @classmethod
    def of(cls, source: str, size: int) -> DiskIdentity:
        status = status_of(source)
        if status is None:
            number = _block_number(source)
            return cls(source, size, boot=boot_id() if number else "", number=number)
        return cls(
            source,
            size,
            status.st_dev,
            status.st_ino,
            boot_id(),
            _filesystem(source, status.st_dev),
        )

    def is_one_file(self, other: DiskIdentity) -> bool | None:
        """The same file or block device, whatever its path; None if that cannot be known."""
        if self.number and self.number == other.number and self.boot == other.boot:
            return True
        if not self.inode or not other.inode:
            return None
        if self.inode != other.inode:
            return False
        if self.device == other.device and (self.boot == other.boot or not self.boot):
            return True
        if self.filesystem and self.filesystem == other.filesystem:
            return True
        return None

    def is_same(self, other: DiskIdentity) -> bool:
        """The same path, or surely the same file or device under another one."""
        is_same = same_place(self.source, other.source) is Same.YES
        return is_same or bool(self.is_one_file(other))

    def shares_storage(self, other: DiskIdentity) -> bool:
        """Whether `other`, which exists now, surely lies on the same file or device: a loop device
        on the file, a partition, a device that is mapped to it, or the other way round."""
        try:
            layers = layers_of(os.stat(other.source), other.source)
        except OSError:
            return False
        files = [layer for layer in layers if layer.path and self.inode == layer.thing[2]]
        if any(self.is_one_file(DiskIdentity.of(layer.path, 0)) for layer in files):
            return True
        if not self.number or self.boot != boot_id():
            return False
        return bool(share_storage(layers_of_device(self.number), layers))


def _block_number(source: str) -> int:
    try:
        status = os.stat(source)
    except OSError:
        return 0
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else 0


def _filesystem(path: str, device: int) -> str:
    """The id of the file system at `path`; "" if it has none that is good at the next boot."""
    try:
        number = os.statvfs(path).f_fsid
    except OSError:
        return ""
    major, minor = os.major(device), os.minor(device)
    encoded = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12  # new_encode_dev() of Linux
    return f"{number:016x}" if number not in (0, encoded) else ""


@dataclass(frozen=True, slots=True)
class LastSeen:
    """What a server that was killed has noted of its disk's file, last of all."""

    alive_s: float
    """Wall-clock time, as the others."""
    seen_s: float = 0.0
    """When it began to look; 0 if it never did."""
    mtime_ns: int = 0
    """The time of change that it found."""
    is_exact: bool = False
    """Before that look it had the journal forget what was done, so that the journal tells whether
    there was a change since. Older versions did not."""

    @classmethod
    def from_bytes(cls, content: bytes) -> LastSeen | None:
        """None if nothing was noted. Older versions noted `alive_s` alone."""
        if len(content) < _ALIVE.size:
            return None
        (alive_s,) = _ALIVE.unpack_from(content)
        if len(content) < _ALIVE.size + _SEEN.size:
            return cls(alive_s)
        seen_s, mtime_ns = _SEEN.unpack_from(content, _ALIVE.size)
        return cls(alive_s, seen_s, mtime_ns, any(content[_ALIVE.size + _SEEN.size :]))


def write_alive(memory: memoryview, time_s: float) -> None:
    _ALIVE.pack_into(memory, 0, time_s)


def write_seen(memory: memoryview, time_s: float, mtime_ns: int) -> None:
    """`time_s` is from before the look, and Journal.forget_done from before that."""
    _SEEN.pack_into(memory, _ALIVE.size, time_s, mtime_ns)
    _IS_EXACT.pack_into(memory, _ALIVE.size + _SEEN.size, True)


def check_unchanged(source: str, clean_mtime_ns: int) -> None:
    """Since an orderly end. Raises StateError."""
    status = status_of(source)
    if status is not None and status.st_mtime_ns != clean_mtime_ns:
        raise StateError("the disk was written to after its server ended")


def check_unchanged_since_killed(source: str, last: LastSeen, *, was_idle: bool) -> None:
    """By anybody but the server that was killed. `was_idle`: the journal has no change since that
    server last looked. Raises StateError."""
    status = status_of(source)
    if status is None or status.st_mtime_ns == last.mtime_ns:
        return
    is_known = last.is_exact and was_idle
    if (
        is_known
        or not last.seen_s - SEEN_SLACK_S <= status.st_mtime <= last.alive_s + ALIVE_SLACK_S
    ):
        raise StateError("the disk was written to after its server was killed")


def check_unchanged_since_saved(source: str, saved_s: float, saved_mtime_ns: int) -> None:
    """By anybody but the server that a power cut ended. What guests wrote last, and with it the
    time of that, may be lost: so an older time is no sign. Raises StateError."""
    status = status_of(source)
    if status is None or status.st_mtime_ns == saved_mtime_ns:
        return
    if status.st_mtime > saved_s + SAVED_SLACK_S:
        raise StateError("the disk was written to after its server was killed")


def mtime_ns(source: str) -> int:
    """0 if it has none."""
    status = status_of(source)
    return status.st_mtime_ns if status is not None else 0


def status_of(source: str) -> os.stat_result | None:
    """Of a regular file; None for what tells nothing of its changes."""
    try:
        status = os.stat(source)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None
