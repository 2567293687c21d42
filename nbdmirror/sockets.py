"""Unix sockets that servers of ours listen on: bound safely, and stale ones taken over."""

from __future__ import annotations

import errno
import os
import socket
import stat

from nbdmirror.errors import ConfigError

BACKLOG = 32


def bind_unix_socket(path: str, *, parameter: str = "qmp") -> socket.socket:
    """A listening Unix socket at `path`, mode 0600 from its first moment.

    A socket file that nobody listens on any more is taken over; anything else at `path` is left
    alone. Raises ConfigError, which starts with `parameter`. For use before nbdkit forks.
    """
    path = os.path.abspath(path)  # nbdkit changes to / when it goes into the background
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        remove_stale_socket(path, parameter)
        # Linux creates the file with the mode of the socket's own inode: no umask to juggle with.
        os.fchmod(listener.fileno(), stat.S_IRUSR | stat.S_IWUSR)
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno is None:  # Python's own check of sun_path's 108 bytes
            reason = "the path is too long for a Unix socket (107 bytes at most)"
        elif error.errno == errno.ENOENT:
            reason = "its directory does not exist"
        elif error.errno == errno.EADDRINUSE:
            reason = "is in use by another process"
        else:
            reason = error.strerror or str(error)
        raise ConfigError(f"{parameter}: {path}: {reason}") from error
    except ConfigError:
        listener.close()
        raise
    return listener


def remove_stale_socket(path: str, parameter: str) -> None:
    """Make `path` free to bind if only a dead server's socket is there; else raise ConfigError."""
    try:
        before = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(before.st_mode):
        raise ConfigError(f"{parameter}: {path}: exists and is not a socket; it was left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a live server with a full backlog says EAGAIN
        answer = probe.connect_ex(path)
    if answer == errno.ECONNREFUSED and os.path.samestat(before, os.lstat(path)):
        os.unlink(path)
    elif answer != errno.ENOENT:
        raise ConfigError(f"{parameter}: {path}: is in use by another process")
