"""The identity of a disk's file, and its last time of change.

Device numbers are valid in one boot. After a reboot, or when its file system is mounted again, a
file may have another device number, and another file may have its old one. So across boots the
inode and the file system's ID count, and always where both are known. A deleted file's inode is
given to another file, often the next one, so the time of birth counts as well, if there is one. Not
every file system has a lasting ID (XFS and FAT use the device number, network file systems have
none): then the answer is unknown, except for a record that knows no boot. There the same number
counts: an old side that is served is worse than a start that is refused, and everything copied
again.

Times of change come from the clock of the file's system, which may be another host, and may have
been set meanwhile. So they are compared with times of the same file first.
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
from nbdmirror.layers import WHOLE, Layer, layers_of, layers_of_device, share_storage
from nbdmirror.state.json_record import COUNT, TEXT, Key
from nbdmirror.state.sealed_files import StateError
from nbdmirror.syscalls import birth_ns

ALIVE_SLACK_S = 3.0
"""If a disk was changed later than this after its server was last alive, another program changed
it. The server notes four times a second that it is alive, unless the machine is busy."""

SEEN_SLACK_S = 3.0
"""A change by the server itself after its last check is at most so much older than that check. File
systems have times of 2 s (FAT), and their clock is some milliseconds late."""

SAVED_SLACK_S = 60.0
"""As ALIVE_SLACK_S, after a power cut: counted from the last save of bitmaps or intents."""

_ALIVE = struct.Struct("d")
_SEEN = struct.Struct("dq")
_IS_EXACT = struct.Struct("?")
ALIVE_BYTES = _ALIVE.size + _SEEN.size + _IS_EXACT.size

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def boot_id() -> str:
    """The ID of the running kernel's boot; "" if not known."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class DiskIdentity:
    """Identifies a disk. For files and block devices; other disks have only their name and size."""

    source: Annotated[str, Key("source", TEXT)]
    size: Annotated[int, Key("size", COUNT)]
    """The disk's size in bytes; the file may be larger."""
    device: Annotated[int, Key("device", COUNT)] = 0
    inode: Annotated[int, Key("inode", COUNT)] = 0
    boot: Annotated[str, Key("boot", TEXT)] = ""
    """The boot in which `device` is valid. "" in records of older versions."""
    filesystem: Annotated[str, Key("filesystem", TEXT)] = ""
    """The file system's ID (statvfs), hexadecimal; "" if it has none."""
    number: Annotated[int, Key("number", COUNT)] = 0
    """A block device's number, which all of its nodes have; valid in the same boot."""
    birth_ns: Annotated[int, Key("birth_ns", COUNT)] = 0
    """The file's time of birth; 0 if its file system has none, and in records of older versions."""

    @classmethod
    def of(cls, source: str, size: int) -> DiskIdentity:
        """The identity of the disk at `source`, a path or URI, of `size` bytes."""
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
            birth_ns=birth_ns(source),
        )

    def is_one_file(self, other: DiskIdentity) -> bool | None:
        """Whether both are the same file or block device, under any path; None if unknown."""
        is_one_boot = bool(self.boot) and self.boot == other.boot
        if self.number and self.number == other.number and is_one_boot:
            return True
        if not self.inode or not other.inode:
            is_file = bool(self.inode or other.inode)
            return False if is_file and (self.number or other.number) else None
        births = {self.birth_ns, other.birth_ns} - {0}
        if self.inode != other.inode or len(births) > 1:
            return False
        if self.filesystem and other.filesystem:
            return True if self.filesystem == other.filesystem else None
        if self.device == other.device and (is_one_boot or not self.boot):
            return True
        return None

    def is_same(self, other: DiskIdentity) -> bool:
        """Whether both have the same path, or are surely the same file or device."""
        is_same = same_place(self.source, other.source) is Same.YES
        return is_same or bool(self.is_one_file(other))

    def shares_storage(self, other: DiskIdentity) -> bool:
        """Whether `other`, which exists now, surely lies on the same file or device: as a loop
        device, a partition or a mapped device, or the other way round."""
        try:
            layers = layers_of(os.stat(other.source), other.source)
        except OSError:
            return False
        files = [layer for layer in layers if layer.path and self.inode == layer.thing[2]]
        if any(self.is_one_file(DiskIdentity.of(layer.path, 0)) for layer in files):
            return True
        if not self.number or not self.boot or self.boot != boot_id():
            return False
        return bool(share_storage(layers_of_device(self.number), layers))

    def lies_on(self, layers: list[Layer]) -> bool:
        """Whether the disk is where it was, and surely shares storage with these layers."""
        if not self.is_one_file(DiskIdentity.of(self.source, 0)):
            return False
        try:
            return bool(share_storage(layers_of(os.stat(self.source), self.source), layers))
        except OSError:
            return False

    def files_below(self) -> tuple[DiskIdentity, ...]:
        """The files that a block device lies on as a whole. After a reboot they may be served by
        themselves, or through another device. May wait for storage."""
        layers = layers_of_device(self.number) if self.number else ()
        files = (layer.path for layer in layers if layer.range == WHOLE and layer.path)
        return tuple(DiskIdentity.of(path, self.size) for path in files)


def _block_number(source: str) -> int:
    try:
        status = os.stat(source)
    except OSError:
        return 0
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else 0


def _filesystem(path: str, device: int) -> str:
    """The ID of the file system at `path`; "" if it has none that stays after a reboot."""
    try:
        number = os.statvfs(path).f_fsid
    except OSError:
        return ""
    major, minor = os.major(device), os.minor(device)
    encoded = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12  # new_encode_dev() of Linux
    return f"{number:016x}" if number not in (0, encoded) else ""


@dataclass(frozen=True, slots=True)
class LastSeen:
    """The last notes of a killed server about its disk's file."""

    alive_s: float
    """Seconds since 1970, as all times here."""
    seen_s: float = 0.0
    """When the last check began; 0 if there was none."""
    mtime_ns: int = 0
    """The time of change at that check."""
    is_exact: bool = False
    """Before that check the journal forgot finished changes, so the journal shows whether a change
    came later. Not so in older versions."""

    @classmethod
    def from_bytes(cls, content: bytes) -> LastSeen | None:
        """The notes; None if there are none. Older versions noted only `alive_s`."""
        if len(content) < _ALIVE.size:
            return None
        (alive_s,) = _ALIVE.unpack_from(content)
        if len(content) < _ALIVE.size + _SEEN.size:
            return cls(alive_s)
        seen_s, mtime_ns = _SEEN.unpack_from(content, _ALIVE.size)
        return cls(alive_s, seen_s, mtime_ns, any(content[_ALIVE.size + _SEEN.size :]))


def write_alive(memory: memoryview, time_s: float) -> None:
    """Note that the server is alive at `time_s`, seconds since 1970."""
    _ALIVE.pack_into(memory, 0, time_s)


def write_seen(memory: memoryview, time_s: float, mtime_ns: int) -> None:
    """Note a check. `time_s` was taken before the check, and Journal.forget_done called before
    that."""
    _SEEN.pack_into(memory, _ALIVE.size, time_s, mtime_ns)
    _IS_EXACT.pack_into(memory, _ALIVE.size + _SEEN.size, True)


def check_unchanged(source: str, clean_mtime_ns: int) -> None:
    """Raise StateError if the file has changed since an orderly end."""
    status = status_of(source)
    if status is not None and status.st_mtime_ns != clean_mtime_ns:
        raise StateError("the disk was written to after its server ended")


def check_unchanged_since_killed(source: str, last: LastSeen, *, was_idle: bool) -> None:
    """Raise StateError if another program than the killed server has changed the file. `was_idle`:
    the journal has no change since that server's last check."""
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
    """Raise StateError if another program than the server that a power cut ended has changed the
    file. Guests' last writes may be lost, and their time of change too: so an older time is
    accepted."""
    status = status_of(source)
    if status is None or status.st_mtime_ns == saved_mtime_ns:
        return
    if status.st_mtime > saved_s + SAVED_SLACK_S:
        raise StateError("the disk was written to after its server was killed")


def mtime_ns(source: str) -> int:
    """The file's time of change; 0 without a file."""
    status = status_of(source)
    return status.st_mtime_ns if status is not None else 0


def status_of(source: str) -> os.stat_result | None:
    """The status of a regular file; None for other sources."""
    try:
        status = os.stat(source)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None
