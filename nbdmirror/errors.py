"""The exception tree of nbdmirror.

    Error                       has an errno (for guests) and a QMP error class (for tools)
    ├── ConfigError             a parameter is wrong: names it; nothing was started
    │   └── Unreachable         an NBD server does not answer, or not yet
    ├── CommandError            a QMP command is refused: nothing has changed
    │   ├── CommandNotFound     no such command (QMP class CommandNotFound)
    │   └── DeviceNotActive     no such block job (QMP class DeviceNotActive)
    └── DeviceError             an I/O request failed on one device; carries errno
        ├── DeviceLost          the connection is lost; requests in flight have an unknown outcome
        └── TargetRefused       a mirror must not write there, and has not

Errors of a raw file or block device stay the operating system's `OSError`. `errno_of` is the errno
of either kind, `guest_errno` the one that a guest gets.
"""

from __future__ import annotations

import errno as _errno


class Error(Exception):
    """Root of the tree. `str(error)` is one line that says what failed and what to do."""

    errno: int = _errno.EIO
    qmp_class: str = "GenericError"


class ConfigError(Error):
    """A parameter is missing, misspelt or has a bad value. Nothing has been started."""

    errno = _errno.EINVAL


class Unreachable(ConfigError):
    """No connection to an NBD server is possible now; another attempt may succeed."""


class CommandError(Error):
    """A command was refused; the server's state has not changed."""

    errno = _errno.EINVAL


class CommandNotFound(CommandError):
    qmp_class = "CommandNotFound"


class DeviceNotActive(CommandError):
    qmp_class = "DeviceNotActive"


class DeviceError(Error):
    """A request failed on a device. A part of its range may have changed."""

    def __init__(self, message: str, errno: int = _errno.EIO) -> None:
        super().__init__(message)
        self.errno = errno or _errno.EIO


class DeviceLost(DeviceError):
    """The device's connection is dead. Each request in flight has an unknown outcome."""


class TargetRefused(DeviceError):
    """A target is something else than a target. Nothing was written to it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, _errno.EINVAL)


IO_ERRORS = (OSError, DeviceError)
"""The errors that a request on any device may raise. Any other exception is a bug."""


_GUESTS = frozenset(
    [
        *(_errno.EPERM, _errno.EROFS, _errno.EIO, _errno.ENOMEM, _errno.EINVAL, _errno.ENOSPC),
        *(_errno.EDQUOT, _errno.EFBIG, _errno.EOVERFLOW, _errno.ENOTSUP, _errno.ESHUTDOWN),
    ]
)


def errno_of(error: BaseException) -> int:
    """The errno of `error`; EIO if it has none."""
    return getattr(error, "errno", None) or _errno.EIO


def guest_errno(error: BaseException) -> int:
    """The errno of `error` for a guest: EIO unless NBD has that errno, or one that nbdkit maps to
    its own. nbdkit would send any other as EINVAL, as if the guest's request made no sense: a
    disk's medium error (ENODATA), a lost path (ENOLINK), a stale NFS handle (ESTALE)."""
    code = errno_of(error)
    return code if code in _GUESTS else _errno.EIO
