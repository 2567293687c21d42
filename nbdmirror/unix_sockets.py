"""Unix sockets of servers, and other files that a server creates: bound safely, and stale ones
taken over.

Their directories may be writable for other users, especially /tmp. There only this user's files are
removed, a symbolic link as the last part of a path is not followed, and all steps use one
descriptor of the directory, so that another user cannot replace the directory in between."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import socket
import stat
import time
from collections.abc import Iterator

from nbdmirror.errors import ConfigError
from nbdmirror.local_servers import has_proc
from nbdmirror.paths import absolute_path

BACKLOG = 32

LOCK_S_MAX = 1.0
"""How long to wait for another process that takes over a socket in the same directory. Every user
who can read the directory could hold that lock."""
LOCK_POLL_S = 0.01


def bind_unix_socket(path: str, *, parameter: str = "qmp") -> socket.socket:
    """A listening Unix socket at `path`, mode 0600 from its first moment.

    The socket file of a dead server is taken over, if that is allowed; any other file at `path` is
    left alone. Raises ConfigError, which begins with `parameter`. For use before nbdkit forks.
    """
    path = absolute_path(path)  # nbdkit changes to / when it goes into the background
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _locked(path) as directory:
            if _is_stale_socket(path, parameter, directory):
                os.unlink(os.path.basename(path), dir_fd=directory)
            # Linux creates the file with the mode of the socket's inode, so the umask does not
            # matter.
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


def check_socket(path: str, parameter: str, *, remove: bool = False) -> None:
    """Raise ConfigError for any file at `path` but a dead server's socket, and `remove` that."""
    try:
        with _locked(path) as directory:
            if _is_stale_socket(path, parameter, directory) and remove:
                os.unlink(os.path.basename(path), dir_fd=directory)
    except OSError as error:
        raise ConfigError(f"{parameter}: {path}: {error.strerror}") from error


def remove_socket(path: str, file: os.stat_result) -> None:
    """Remove a socket file, or another file of this server, if it is still the one at `path`."""
    with contextlib.suppress(OSError), _locked(path) as directory:
        name = os.path.basename(path)
        if os.path.samestat(file, os.stat(name, dir_fd=directory, follow_symlinks=False)):
            os.unlink(name, dir_fd=directory)


def claim_pidfile(path: str, parameter: str) -> os.stat_result | None:
    """`check_pidfile`, and where other users may create files create this one, so that none of them
    can put a link there. Returns the file if it was created. Raises ConfigError."""
    made = None
    try:
        with _locked(path) as directory:
            if _is_shared(os.fstat(directory)):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                fd = os.open(os.path.basename(path), flags, 0o644, dir_fd=directory)
                made = os.fstat(fd)
                os.close(fd)
    except (FileExistsError, FileNotFoundError):
        pass
    except OSError as error:
        raise ConfigError(f"{parameter}: {path}: {error.strerror}") from error
    check_pidfile(path, parameter)
    return made


def check_pidfile(path: str, parameter: str) -> None:
    """Raise ConfigError unless nbdkit, which truncates the file and follows links, would write to a
    file of this user at `path`. Nothing changes."""
    name = os.path.basename(path)
    try:
        with _locked(path) as directory:
            place = os.fstat(directory)
            file = os.stat(name, dir_fd=directory, follow_symlinks=False)
            is_pidfile = stat.S_ISREG(file.st_mode) and _has_a_number(name, directory)
    except FileNotFoundError:
        if os.path.isdir(os.path.dirname(path)):
            return  # nbdkit creates it
        raise ConfigError(f"{parameter}: {path}: its directory does not exist") from None
    except OSError as error:
        raise ConfigError(f"{parameter}: {path}: {error.strerror}") from error
    if not stat.S_ISREG(file.st_mode):
        raise ConfigError(f"{parameter}: {path}: exists and is not a file; it was left alone")
    if (fd := lock_pidfile(path)) is None:
        raise ConfigError(f"{parameter}: {path}: is in use by another server; it was left alone")
    os.close(fd)
    if file.st_nlink != 1 or not _may_remove(file, place):
        raise ConfigError(
            f"{parameter}: {path}: belongs to user {_name_of(file.st_uid)}, or is a hard link; "
            f"it was left alone"
        )
    if not is_pidfile:
        raise ConfigError(f"{parameter}: {path}: contains no process ID; it was left alone")


def _has_a_number(name: str, directory: int) -> bool:
    """Whether the file is a pid file, or empty; it might be a disk."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        return not os.read(fd, 64).strip(b"0123456789\n ")
    finally:
        os.close(fd)


def lock_pidfile(path: str) -> int | None:
    """A descriptor with the lock that a server holds on its pid file while it lives; None if
    another server has it. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if _lock(fd):
        return fd
    os.close(fd)
    return None


def _is_stale_socket(path: str, parameter: str, directory: int) -> bool:
    """Whether a dead server's socket is there, which may be removed. Raises ConfigError for any
    other file."""
    name = os.path.basename(path)
    try:
        file = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(file.st_mode):
        raise ConfigError(f"{parameter}: {path}: exists and is not a socket; it was left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a live server with a full backlog gives EAGAIN
        answer = probe.connect_ex(f"/proc/self/fd/{directory}/{name}")
        if answer == errno.ENOENT and not has_proc():
            answer = probe.connect_ex(path)
            if not os.path.samestat(os.lstat(path), file):
                raise ConfigError(f"{parameter}: {path}: was replaced meanwhile; try again")
    if answer == errno.ECONNREFUSED:
        if not _may_remove(file, os.fstat(directory)):
            raise ConfigError(
                f"{parameter}: {path}: is a dead socket of user {_name_of(file.st_uid)}, in a "
                f"directory where others may write; it was left alone"
            )
        return True
    if answer != errno.ENOENT:
        raise ConfigError(f"{parameter}: {path}: is in use by another process")
    return False


def _may_remove(file: os.stat_result, directory: os.stat_result) -> bool:
    """Whether the file may be removed: only this user and root can write to the directory, or the
    file belongs to this user, or file and directory have the same owner."""
    return file.st_uid in (os.geteuid(), directory.st_uid) or not _is_shared(directory)


def _is_shared(directory: os.stat_result) -> bool:
    """Whether users other than root and this one may create files there."""
    is_writable = bool(directory.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    return is_writable or directory.st_uid not in (0, os.geteuid())


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int]:
    """A descriptor of the directory of `path`, locked against other servers: two servers that find
    the same dead socket must not remove each other's new socket."""
    place, flags = os.path.dirname(path) or ".", os.O_DIRECTORY | os.O_CLOEXEC
    try:
        directory = os.open(place, os.O_RDONLY | flags)
    except PermissionError:
        directory = os.open(place, os.O_PATH | flags)  # a directory that cannot be listed
    try:
        deadline_s = time.monotonic() + LOCK_S_MAX
        while not _lock(directory) and time.monotonic() < deadline_s:
            time.sleep(LOCK_POLL_S)
        yield directory
    finally:
        os.close(directory)  # releases the lock


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # such a descriptor or file system has no locks
    return True
