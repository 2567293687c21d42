"""QEMU's image locks on raw files: no other process may write to a disk that is served.

The scheme is QEMU's (block/file-posix.c), so that qemu-nbd, QEMU and nbdmirror exclude one another.
One byte is locked for each permission that is used, and another byte for each permission that is
not shared. Both are shared locks; a later process checks whether the counterparts of its bytes are
locked. The locks belong to the open file, so they survive nbdkit's fork and end with the last
descriptor.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from nbdmirror.errors import ConfigError

_PERMISSION_BASE, _UNSHARED_BASE = 100, 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux
_UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""A file system without locks: QEMU's locking=auto continues without locks as well."""


def lock_image(fd: int, path: str, *, read_only: bool) -> None:
    """Take the locks for serving the image `fd`; they last until the file is closed. Raises
    ConfigError if another process writes to the image, or excludes writers."""
    permissions = [_CONSISTENT_READ] if read_only else [_CONSISTENT_READ, _WRITE]
    unshared = [] if read_only else [_WRITE, _RESIZE]
    try:
        for bit in permissions:
            _lock(fd, _PERMISSION_BASE + bit)
        for bit in unshared:
            _lock(fd, _UNSHARED_BASE + bit)
        conflicts = [_is_locked(fd, _UNSHARED_BASE + bit) for bit in permissions]
        conflicts += [_is_locked(fd, _PERMISSION_BASE + bit) for bit in unshared]
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return
        raise ConfigError(f"{path}: cannot be locked: {os.strerror(error.errno or 0)}") from error
    if any(conflicts):
        raise ConfigError(f"{path}: is in use by another process (its image lock is held)")


def _lock(fd: int, start: int) -> None:
    request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, start, 1, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)


def _is_locked(fd: int, start: int) -> bool:
    """Whether another open file has locked the byte."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
