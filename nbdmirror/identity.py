"""Whether two files, block devices or NBD exports are the same, under any name.

A file or a Unix socket is identified by its device and inode, a block device by its number. An
export is identified by its server's description (`label`), otherwise by its server and its name.
Names decide only if nothing better is known. If nothing is known the answer is UNKNOWN, and the
caller decides which mistake would be worse.

For any thread. `same_place` may wait: it queries files, and with `resolves` addresses.
"""

from __future__ import annotations

import enum
import os
import socket
import stat
import struct
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nbdmirror import syscalls as linux
from nbdmirror.errors import ConfigError
from nbdmirror.layers import layers_of, layers_of_device, share_storage
from nbdmirror.nbd_uri import NbdUri, is_uri, parse

LABEL = "nbdmirror"
SERVER_ID = uuid.uuid4().hex
"""The ID of this process."""

TARGET_ONLY = " target-only"
"""The end of the label of an old side (target_only.py)."""
HOME = "x-nbdmirror-home"
"""Prefix of the export of an old side for the server that has the disk."""

_UCRED = struct.Struct("iII")  # unix(7): struct ucred
_MAPPED = "::ffff:"
_LISTENS = "0A"  # proc(5): /proc/net/tcp
_INIT = 1
"""A socket on which process 1 listens may belong to any server: systemd passes it on."""


class Same(enum.Enum):
    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


def label(disk: str) -> str:
    """The description of this server's export, by which a client recognizes it on any way."""
    return f"{LABEL} {SERVER_ID} {disk}"


def home_of(export: str) -> str:
    """The export with which this process may write to the old side `export`, if it has the disk."""
    return f"{HOME}/{SERVER_ID}/{export}"


def is_old_side(description: str) -> bool:
    """Whether this description is that of a target only."""
    return description.startswith(f"{LABEL} ") and description.endswith(TARGET_ONLY)


def is_same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Compare two existing files. A block device may have several nodes, in several file
    systems."""
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)


def _writes_to(process: int, fd: int, opened: os.stat_result) -> bool:
    """Whether a process of this host has a file or device open for writing that shares storage with
    the one that is open here as `fd`, as far as this process may see. `opened`: the status of `fd`.
    The kernel is queried, and a storage only if the inode's number is the same."""
    here, layers = _OpenFile.of("/proc/self", fd), layers_of(opened)
    files = [layer for layer in layers if layer.path]
    below = {str(layer.thing[2]) for layer in files} | {layer.path for layer in files}
    folder = f"/proc/{process}"
    with suppress(OSError):
        for other in os.listdir(f"{folder}/fd"):
            with suppress(OSError):
                there, name = _OpenFile.of(folder, int(other)), f"{folder}/fd/{other}"
                if there.flags & os.O_ACCMODE == os.O_RDONLY:
                    continue
                if number := linux.block_number(name):
                    found = layers_of_device(number)
                elif there.inode == here.inode or there.inode in below:
                    found = layers_of(os.stat(name))
                else:
                    continue
                if share_storage(layers, found):
                    return True
    return False


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """A descriptor of a process, as the kernel shows it. (proc(5))"""

    name: str
    flags: int
    inode: str
    """The inode's number; the name if the kernel does not show the number (before 5.14)."""

    @classmethod
    def of(cls, folder: str, fd: int) -> _OpenFile:
        name = os.readlink(f"{folder}/fd/{fd}")
        lines = Path(f"{folder}/fdinfo/{fd}").read_text().splitlines()
        info = dict(line.split(":", 1) for line in lines if ":" in line)
        return cls(name, int(info["flags"], 8), info.get("ino", name).strip())


def _process_of(listener: int) -> int:
    """The process of this host that has the socket with this inode; 0 if not known."""
    link = f"socket:[{listener}]"
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # ended, or not permitted
            for fd in os.listdir(f"/proc/{process}/fd"):
                with suppress(OSError):
                    if os.readlink(f"/proc/{process}/fd/{fd}") == link and process != str(_INIT):
                        return int(process)
    return 0


def same_place(one: str, other: str, *, resolves: bool = False) -> Same:
    """Compare two paths or NBD URIs. `resolves`: resolve hosts, which takes the resolver's time;
    each address of `one` must be an address of `other`."""
    if is_uri(one) != is_uri(other):
        return Same.UNKNOWN  # the server may export that file
    if not is_uri(one):
        return _same_path(one, other)
    try:
        first, second = parse(one), parse(other)
    except ConfigError:
        return Same.YES if one == other else Same.UNKNOWN
    server = _same_server(first, second, resolves=resolves)
    if server is Same.YES and first.export != second.export:
        return Same.UNKNOWN  # many servers have the same disk under several names
    return server


def _same_path(one: str, other: str) -> Same:
    if os.path.realpath(one) == os.path.realpath(other):
        return Same.YES
    try:
        return Same.YES if is_same_file(os.stat(one), os.stat(other)) else Same.NO
    except OSError:
        return Same.UNKNOWN


def _same_server(one: NbdUri, other: NbdUri, *, resolves: bool) -> Same:
    if one.transport != other.transport:
        return Same.UNKNOWN
    if one.transport == "unix":
        return _same_path(one.socket, other.socket)
    if one.port != other.port:
        return Same.NO
    hosts = _plain_host(one.host), _plain_host(other.host)
    if hosts[0] == hosts[1]:
        return Same.YES
    if one.transport == "vsock":
        return Same.NO
    if resolves:
        first, second = (_addresses(host, one.port) for host in hosts)
        if first and first <= second:
            return Same.YES
    return Same.UNKNOWN


def _plain_host(host: str) -> str:
    """The canonical spelling of an address or a name."""
    host = host.lower().removesuffix(".")
    address, percent, zone = host.partition("%")
    with suppress(OSError):
        host = socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, address))
        host = host.removeprefix(_MAPPED) if "." in host else host
        if percent:
            with suppress(OSError):
                zone = str(socket.if_nametoindex(zone))
        return host + percent + zone
    with suppress(OSError):
        return socket.inet_ntoa(socket.inet_aton(host))  # 127.1 as well
    return host


def _addresses(host: str, port: int) -> set[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {_plain_host(str(address[0])) for *_, address in found}


@dataclass(frozen=True, slots=True)
class Peer:
    """The export at the other end of a connection, as far as known."""

    server: tuple[object, ...]
    """The file of the Unix socket, or the address."""
    process: int
    """The process that listens on the Unix socket; 0 if not known."""
    export: str
    label: str = ""
    """The description by an nbdmirror; "" for other servers, whose descriptions are free texts."""
    listener: int = 0
    """The inode of the listening TCP socket of a server on this host, which may have several
    addresses; 0 if not known."""

    @classmethod
    def of(cls, connected: socket.socket, uri: str, *, export: str, label: str) -> Peer:
        """The peer of a connection to `uri`. Raises OSError if the connection is lost again."""
        label = label.removesuffix(TARGET_ONLY) if label.startswith(f"{LABEL} ") else ""
        name = connected.getpeername()
        if connected.family != socket.AF_UNIX:
            host, port, *_ = name
            address = _plain_host(str(host)), port
            is_local = _plain_host(str(connected.getsockname()[0])) == address[0]
            listener = _listener(*address) if is_local or address[0].startswith("127.") else 0
            return cls(address, 0, export, label, listener)
        said = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        process, *_ = _UCRED.unpack(said)
        server: tuple[object, ...] = (name, process)
        with suppress(OSError, ConfigError):
            file = os.stat(parse(uri).socket)
            server = (file.st_dev, file.st_ino)
        return cls(server, process if process != _INIT else 0, export, label)

    def reached(self, uri: str) -> str:
        """`uri`, with the address that was reached in place of a name."""
        where = parse(uri)
        if where.transport != "tcp":
            return uri
        return replace(where, host=str(self.server[0])).exact

    def writes_to(self, fd: int, opened: os.stat_result) -> bool:
        """Whether the server is a process of this host that writes to the file or device that is
        open here as `fd`. `opened`: its status. For TCP servers all processes are examined."""
        process = self.process or (_process_of(self.listener) if self.listener else 0)
        return bool(process) and _writes_to(process, fd, opened)

    @property
    def is_home(self) -> bool:
        """The export is a target only that this process may write to."""
        return self.export.startswith(f"{HOME}/")

    @property
    def is_this_process(self) -> bool:
        return self.label.startswith(f"{LABEL} {SERVER_ID} ")

    def same(self, other: Peer) -> Same:
        """Whether both are the same export."""
        if self.label and other.label:
            return Same.YES if self.label == other.label else Same.NO
        is_one_listener = bool(self.listener) and self.listener == other.listener
        if self.server == other.server or is_one_listener:
            return Same.YES if self.export == other.export else Same.UNKNOWN
        if self.process and other.process and self.process != other.process:
            return Same.NO
        return Same.UNKNOWN


def _listener(host: str, port: int) -> int:
    """The inode of the socket on this host that accepts connections to `host`; 0 if not known, or
    if there are several."""
    wildcards = ("::",) if ":" in host else ("0.0.0.0", "::")
    exact, any_address = set(), set()
    for file in ("tcp", "tcp6"):
        with suppress(OSError), open(f"/proc/net/{file}", encoding="ascii") as table:
            for row in list(table)[1:]:
                _, local, _, state, *rest = row.split()
                address, _, number = local.partition(":")
                if state != _LISTENS or int(number, 16) != port:
                    continue
                address = _address_of(address)
                if address == host:
                    exact.add(int(rest[5]))
                elif address in wildcards:
                    any_address.add(int(rest[5]))
    found = exact or any_address
    return found.pop() if len(found) == 1 else 0


def _address_of(words: str) -> str:
    """An address in the kernel's table: 32-bit words in the machine's order."""
    parts = (words[start : start + 8] for start in range(0, len(words), 8))
    packed = b"".join(int(part, 16).to_bytes(4, sys.byteorder) for part in parts)
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    return _plain_host(socket.inet_ntop(family, packed))
