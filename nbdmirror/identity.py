"""Whether two files, block devices or NBD exports are the same, under any name.

A file or a Unix socket is identified by its device and inode, a block device by its number. An
export is identified by its server's description (`label`), otherwise by its server and its name.
Names decide only if nothing better is known. If nothing is known the answer is UNKNOWN, and the
caller decides which mistake would be worse.

For any thread. `same_place` may wait: it queries files, unless it `looks` at none, and with
`resolves` addresses. `socket_file` waits for a file system, too.
"""

from __future__ import annotations

import enum
import itertools
import os
import socket
import stat
import struct
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace

from nbdmirror import local_servers
from nbdmirror.errors import ConfigError, Unreachable
from nbdmirror.layers import Layer, share_storage
from nbdmirror.local_servers import INIT, Storage
from nbdmirror.nbd_uri import NbdUri, is_uri, parse
from nbdmirror.resolver import addresses_of

LABEL = "nbdmirror"
SERVER_ID = uuid.uuid4().hex
"""The ID of this process."""

ADDRESSES_S_MAX = 10.0
"""What the resolver may take for a host; as a server may for a connection."""

TARGET_ONLY = " target-only"
"""The end of the label of an old side (target_only.py)."""
HOME = "x-nbdmirror-home"
"""Prefix of the export of an old side for the server that has the disk."""

_UCRED = struct.Struct("iII")  # unix(7): struct ucred
_MAPPED = "::ffff:"
_LISTENS = "0A"  # proc(5): /proc/net/tcp


SocketFile = tuple[int, int]
"""Device and inode of a Unix socket."""


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


def same_place(one: str, other: str, *, resolves: bool = False, looks: bool = True) -> Same:
    """Compare two paths or NBD URIs. `resolves`: resolve hosts, which takes the resolver's time;
    each address of `one` must be an address of `other`. Not `looks`: of files compare the names
    alone, without waiting for their file systems."""
    if is_uri(one) != is_uri(other):
        return Same.UNKNOWN  # the server may export that file
    if not is_uri(one):
        return _same_path(one, other, looks=looks)
    try:
        first, second = parse(one), parse(other)
    except ConfigError:
        return Same.YES if one == other else Same.UNKNOWN
    server = _same_server(first, second, resolves=resolves, looks=looks)
    if server is Same.YES and first.export != second.export:
        return Same.UNKNOWN  # many servers have the same disk under several names
    return server


def _same_path(one: str, other: str, *, looks: bool) -> Same:
    if not looks:
        return Same.YES if one == other else Same.UNKNOWN
    if os.path.realpath(one) == os.path.realpath(other):
        return Same.YES
    try:
        return Same.YES if is_same_file(os.stat(one), os.stat(other)) else Same.NO
    except OSError:
        return Same.UNKNOWN


def _same_server(one: NbdUri, other: NbdUri, *, resolves: bool, looks: bool) -> Same:
    if one.transport != other.transport:
        return Same.UNKNOWN
    if one.transport == "unix":
        return _same_path(one.socket, other.socket, looks=looks)
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


def socket_file(uri: str) -> SocketFile | None:
    """The file of an NBD URI's Unix socket; None if there is none. Waits for its file system."""
    with suppress(OSError, ConfigError):
        status = os.stat(parse(uri).socket)
        return status.st_dev, status.st_ino
    return None


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
        return set(map(_plain_host, addresses_of(host, port, ADDRESSES_S_MAX)))
    except (OSError, Unreachable):
        return set()


def peer_credentials(connected: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end of a Unix socket, as this process sees them."""
    said = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    process, user, group = _UCRED.unpack(said)
    return process, user, group


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
    listeners: frozenset[int] = frozenset()
    """The inodes of the listening TCP sockets of a server on this host, in a container too: one,
    which may have several addresses, or several that share a port; empty if not known."""
    holders: frozenset[int] = frozenset()
    """The processes of this host that have these sockets."""
    size: int = 0
    """Bytes of the export; 0 if not known."""

    @classmethod
    def of(
        cls, connected: socket.socket, uri: str, *, export: str, label: str, size: int = 0
    ) -> Peer:
        """The peer of a connection to `uri`. Raises OSError if the connection is lost again."""
        label = label.removesuffix(TARGET_ONLY) if label.startswith(f"{LABEL} ") else ""
        name = connected.getpeername()
        if connected.family != socket.AF_UNIX:
            host, port, *_ = name
            address = _plain_host(str(host)), port
            is_local = _plain_host(str(connected.getsockname()[0])) == address[0]
            is_local = is_local or address[0].startswith("127.")
            networks = ["self"] if is_local else _networks_with(address[0])
            found = frozenset[int]().union(*(_listeners(one, *address) for one in networks))
            return cls(address, 0, export, label, found, local_servers.holders(found), size)
        process, *_ = peer_credentials(connected)
        server = socket_file(uri) or (name, process)
        return cls(server, process if process != INIT else 0, export, label, size=size)

    def reached(self, uri: str) -> str:
        """`uri`, with the address that was reached in place of a name."""
        where = parse(uri)
        if where.transport != "tcp":
            return uri
        return replace(where, host=str(self.server[0])).exact

    def writes(self) -> list[Storage]:
        """What the server, if it is a process of this host, has open for writing."""
        return local_servers.written_by(self.holders or {self.process})

    @property
    def storage(self) -> Storage | None:
        """What the export is made of, if that is certain."""
        return local_servers.sole(self.writes(), self.size) if self.size else None

    def writes_to(self, layers: list[Layer]) -> bool:
        """Whether the server is a process of this host that writes to storage of these layers."""
        return any(share_storage(layers, storage.layers) for storage in self.writes())

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
        is_one_server = self.server == other.server or self._shares_listener(other)
        if is_one_server and self.export == other.export:
            return Same.YES
        if self._shares_storage(other):
            return Same.YES
        if not is_one_server and self.process and other.process and self.process != other.process:
            return Same.NO
        return Same.UNKNOWN

    def _shares_listener(self, other: Peer) -> bool:
        """Whether both lead to one server of this host, which may have a listening socket for each
        address of its port."""
        is_one_port = self.server[1:] == other.server[1:]
        has_one_holder = not self.holders.isdisjoint(other.holders)
        return not self.listeners.isdisjoint(other.listeners) or (is_one_port and has_one_holder)

    def _shares_storage(self, other: Peer) -> bool:
        """Whether both are surely made of one file or device of this host: by two servers, or by
        one under two names or ways."""
        return self.size == other.size and local_servers.is_one(self.storage, other.storage)


def _listeners(process: str, host: str, port: int) -> frozenset[int]:
    """The inodes of the sockets in the network of `process` that accept connections to `host`. A
    socket of an address takes them before one of all addresses, and one of IPv4 before one of
    IPv6."""
    preferred = [host, "::"] if ":" in host else [host, "0.0.0.0", "::"]
    found: dict[str, set[int]] = {address: set() for address in preferred}
    for file in ("tcp", "tcp6"):
        with suppress(OSError), open(f"/proc/{process}/net/{file}", encoding="ascii") as table:
            for row in list(table)[1:]:
                _, local, _, state, *rest = row.split()
                address, _, number = local.partition(":")
                if state == _LISTENS and int(number, 16) == port:
                    found.get(_address_of(address), set()).add(int(rest[5]))
    return frozenset(next(filter(None, found.values()), ()))


def _networks_with(host: str) -> list[str]:
    """A process of each other network of this host, as containers have them, with this address."""
    return [one for one in local_servers.other_networks() if host in _addresses_of(one)]


def _addresses_of(process: str) -> set[str]:
    """The addresses in the network of a process."""
    found = set()
    with suppress(OSError), open(f"/proc/{process}/net/fib_trie", encoding="ascii") as table:
        lines = list(table)
        local = (one for one, below in itertools.pairwise(lines) if "32 host LOCAL" in below)
        found |= {line.split()[-1] for line in local}
    with suppress(OSError), open(f"/proc/{process}/net/if_inet6", encoding="ascii") as table:
        packed = (bytes.fromhex(row.split()[0]) for row in table)
        found |= {socket.inet_ntop(socket.AF_INET6, address) for address in packed}
    return found


def _address_of(words: str) -> str:
    """An address in the kernel's table: 32-bit words in the machine's order."""
    parts = (words[start : start + 8] for start in range(0, len(words), 8))
    packed = b"".join(int(part, 16).to_bytes(4, sys.byteorder) for part in parts)
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    return _plain_host(socket.inet_ntop(family, packed))
