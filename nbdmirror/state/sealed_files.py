"""The files of a state directory: sealed, so that damage is detected, and replaced as a whole.

A file is one line of text and the content after it:

    nbdmirror KIND VERSION LENGTH SHA256\\n
    LENGTH bytes, whose SHA-256 it is

`head -1 FILE` shows what a file is, and `tail -n +2 FILE | sha256sum` whether it is sound. The log
of write intents is written in place, and has another format (intent_log.py). docs/state.md
describes the contents.

A folder has exactly the calls of the file system that a store needs, so that a test can use a
folder that loses what was not synced."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from nbdmirror.errors import ConfigError, Error
from nbdmirror.paths import absolute_path

VERSION = 1
LOCK = "lock"
_HEADER_BYTES_MAX = 256


class StateError(Error):
    """A file of a state directory cannot be used: `str(error)` says why. No part of it is used."""


class UnknownFormat(StateError):
    """A sound file that this nbdmirror cannot read: of a newer version, or with unexpected fields.
    Another nbdmirror may read it, so the file stays as it is."""


def seal(kind: str, body: bytes) -> bytes:
    """The content of a sealed file."""
    checksum = hashlib.sha256(body).hexdigest()
    return f"nbdmirror {kind} {VERSION} {len(body)} {checksum}\n".encode() + body


def unseal(kind: str, content: bytes) -> bytes:
    """The body of a sealed file. Raises StateError."""
    line, newline, _ = content[:_HEADER_BYTES_MAX].partition(b"\n")
    words = line.split(b" ")
    if not newline or len(words) != 5 or words[0] != b"nbdmirror":
        raise StateError("is damaged: its first bytes are wrong")
    if words[1] != kind.encode():
        raise StateError(f"is a file of another kind: {words[1][:20]!r} instead of {kind!r}")
    if not words[2].isdigit():
        raise StateError(f"is damaged: its version is {words[2][:20]!r}")
    check_version(int(words[2]))
    body = content[len(line) + 1 :]
    if not words[3].isdigit() or len(body) < int(words[3]):
        text = f"is damaged: {words[3][:20]!r} bytes are announced, {len(body)} are present"
        raise StateError(text)
    body = body[: int(words[3])]
    if hashlib.sha256(body).hexdigest().encode() != words[4]:
        raise StateError("is damaged: its checksum is wrong")
    return body


def check_version(version: int) -> None:
    """Raise UnknownFormat if a file's version is newer, StateError if it does not exist."""
    if version > VERSION:
        text = f"has version {version} of the format, and this nbdmirror reads version {VERSION}"
        raise UnknownFormat(text)
    if version < VERSION:
        raise StateError(f"is damaged: there is no version {version} of the format")


class Slots(Protocol):
    """A file with a few slots of one size, each written as a whole."""

    def write(self, index: int, content: bytes, *, sync: bool) -> None:
        """Write a slot, on disk on return if `sync`. A crash does not change the other slots.
        Raises OSError."""

    def read(self, index: int) -> bytes:
        """The content of a slot. Raises OSError."""

    def close(self) -> None: ...


class Folder(Protocol):
    """A state directory. Each call is on disk when it returns. All calls raise OSError."""

    path: Path

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it does not exist."""

    def prepare(self, name: str, content: bytes) -> None:
        """Write `content` to disk under another name, ready to become the file."""

    def commit(self, names: list[str], removed: list[str] | None = None) -> None:
        """Put prepared content in the place of the files `names`, and remove the files `removed`.
        Each file changes wholly or not at all, in this order."""

    def refuse(self, name: str) -> None:
        """Rename a file that cannot be used, so that a user can examine it."""

    def slots(self, name: str, slot_bytes: int, count: int) -> Slots:
        """Open the file, or create it, at its full size."""


class DiskFolder(Folder):
    """A real directory, which one process at a time may use."""

    def __init__(self, path: Path) -> None:
        """Creates the directory, mode 0700, if it does not exist. Raises ConfigError."""
        self.path = path
        self._place = absolute_path(str(path))  # nbdkit leaves its directory
        try:
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"state-dir: {path}: cannot be used: {error.strerror}") from error
        self._status = os.fstat(self._fd)
        if self._status.st_mode & stat.S_IWOTH:
            os.close(self._fd)
            raise ConfigError(f"state-dir: {path}: others may write to it; do: chmod o-w {path}")
        try:
            # Not the directory itself: sockets may be bound in it, which locks it for a moment.
            self._lock_fd = self._open(LOCK, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            text = f"state-dir: {path}: is in use by another nbdmirror"
            raise ConfigError(text) from error
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(f"state-dir: {path}: cannot be used: {error.strerror}") from error

    def read(self, name: str) -> bytes | None:
        try:
            fd = self._open(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with open(fd, "rb") as file:
            return file.read()

    def prepare(self, name: str, content: bytes) -> None:
        self._check_place()
        new = new_name(name)
        with suppress(FileNotFoundError):
            os.unlink(new, dir_fd=self._fd)
        try:
            with open(self._open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:  # free the space of a full disk
            with suppress(OSError):
                os.unlink(new, dir_fd=self._fd)
            raise

    def commit(self, names: list[str], removed: list[str] | None = None) -> None:
        for name in names:
            os.rename(new_name(name), name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        for name in removed or ():
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)
        os.fsync(self._fd)

    def refuse(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.rename(name, f"{name}.refused", src_dir_fd=self._fd, dst_dir_fd=self._fd)
        os.fsync(self._fd)

    def slots(self, name: str, slot_bytes: int, count: int) -> Slots:
        fd = self._open(name, os.O_RDWR | os.O_CREAT)
        try:
            # Allocate all of it now, so that later writes need no space.
            os.posix_fallocate(fd, 0, slot_bytes * count)
            os.fsync(fd)
            os.fsync(self._fd)
        except BaseException:
            os.close(fd)
            raise
        return DiskSlots(fd, slot_bytes)

    def close(self) -> None:
        """Let other processes use the directory. Idempotent."""
        if self._fd >= 0:
            os.close(self._lock_fd)
            os.close(self._fd)
            self._fd = -1

    def _check_place(self) -> None:
        """Raise OSError if the next start would find another directory, or none: it would not know
        of a pivot that is recorded here, and serve the old side."""
        opened = os.fstat(self._fd)
        try:
            is_here = os.path.samestat(os.stat(self._place), opened)
        except FileNotFoundError:
            is_here = False
        except OSError:
            return  # not known: another user may be barred from the directories above
        if not is_here and opened.st_nlink:  # `_open` tells of a removed one
            text = "the directory is not at its path any more: put it back"
            raise OSError(errno.EIO, text, str(self.path))

    def _open(self, name: str, flags: int) -> int:
        """Open a file. A file that root creates gets the directory's owner, as whom the server may
        continue."""
        try:
            fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        except FileNotFoundError as error:
            if not flags & os.O_CREAT:
                raise
            text = "the directory was removed, and has to be there when the server is started again"
            raise OSError(errno.EIO, text, str(self.path)) from error
        if flags & os.O_CREAT and os.geteuid() == 0:
            os.fchown(fd, self._status.st_uid, self._status.st_gid)
        return fd


class DiskSlots(Slots):
    """Slots in a real file."""

    def __init__(self, fd: int, slot_bytes: int) -> None:
        self._fd = fd
        self._slot_bytes = slot_bytes

    def write(self, index: int, content: bytes, *, sync: bool) -> None:
        assert len(content) <= self._slot_bytes
        if os.pwrite(self._fd, content, index * self._slot_bytes) != len(content):
            raise OSError(errno.EIO, "a short write")
        if sync:
            os.fdatasync(self._fd)

    def read(self, index: int) -> bytes:
        return os.pread(self._fd, self._slot_bytes, index * self._slot_bytes)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def new_name(name: str) -> str:
    """The name under which a file is prepared."""
    return f"{name}.new"
