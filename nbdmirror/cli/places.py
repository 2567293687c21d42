"""Checks of a server's paths and addresses before nbdkit starts: nbdkit's errors say less, or are
where no user sees them."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import subprocess

from nbdmirror.errors import ConfigError, Unreachable
from nbdmirror.logs import print_startup_error
from nbdmirror.names import DISK_RULE
from nbdmirror.nbd_uri import parse
from nbdmirror.resolver import connection_to

TARGET_S_MAX = 3.0


def check_disk(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        text = f"{path}: no such disk; create it first (truncate -s SIZE FILE)"
        if os.path.islink(path):
            text = f"{path}: is a link to {os.readlink(path)}, which does not exist"
        if "=" in path:
            text += f"; if the part before the '=' is meant as a name: {DISK_RULE}"
        raise ConfigError(text) from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise ConfigError(f"{path}: is a directory, not a disk")


def check_journal(path: str) -> None:
    """Raise ConfigError if there is no journal to open at `path`, which is no NBD URI."""
    if not os.path.lexists(path):
        kinds = "an NBD URI, a raw file or a block device"
        raise ConfigError(f"{path}: does not exist; a journal is {kinds}")
    check_disk(path)


def check_directory(parameter: str, path: str) -> None:
    """Raise an error if nbdkit could not create a file at `path`. nbdkit would notice only after
    the control socket exists, and leave that behind; in the background no user sees the error."""
    folder = os.path.dirname(path)
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        is_readonly = os.statvfs(folder).f_flag & os.ST_RDONLY
        reason = os.strerror(errno.EROFS if is_readonly else errno.EACCES)
        raise ConfigError(f"{parameter}: {path}: cannot be created: {reason}")


def check_port(host: str, port: int) -> None:
    for probe in bound(host, port, "--address", "--port"):
        probe.close()


def bound(host: str, port: int, host_option: str, port_option: str) -> list[socket.socket]:
    """TCP sockets, bound to all addresses of `host`, that do not listen yet. Raises ConfigError,
    which begins with the wrong option."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "is no name of a host"
        raise ConfigError(f"{host_option}: {host}: {reason}") from error
    found: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in addresses:
            found.append(socket.socket(family, kind, protocol))
            found[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                found[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            found[-1].bind(address)
    except OSError as error:
        for one in found:
            one.close()
        text = f"{port_option}: cannot listen on {host} port {port}: {error.strerror}"
        raise ConfigError(text) from error
    return found


def warn_of_target(uri: str) -> None:
    """Warn if the mirror's target does not answer: in the background only the log reports that."""
    where = parse(uri)
    if where.transport == "vsock":
        return
    try:
        if where.socket:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(TARGET_S_MAX)
                probe.connect(where.socket)
        else:
            connection_to(where.host, where.port, TARGET_S_MAX).close()
    except (OSError, Unreachable) as error:
        reason = getattr(error, "strerror", None) or error
        text = f"--mirror-to {uri}: {reason}; the disk has no mirror yet"
        print_startup_error(f"warning: {text}", logging.WARNING)


def may(access: str, path: str, uid: int, gid: int) -> bool:
    """Whether that user has access: `access` is an option of test(1), -r or -w."""
    test = subprocess.run(["test", access, path], user=uid, group=gid, extra_groups=(), check=False)
    return test.returncode == 0


def make_for_user(option: str, path: str, uid: int, gid: int) -> None:
    """Make a directory of that user, mode 0700, if there is none. Raises ConfigError."""
    try:
        os.mkdir(path, 0o700)
        os.chown(path, uid, gid)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"{option}: {path}: cannot be created: {error.strerror}") from error
