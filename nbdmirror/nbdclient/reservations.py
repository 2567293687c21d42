"""Reservations: what this process writes to as a disk or a target is no other nbdmirror's of this
host.

Two mirrors to one export make a target of two halves, and a mirror to another server's disk
overwrites that disk; each of them looks well. So a process binds an abstract Unix socket for each
place that it writes to, whose name says which place that is. The kernel removes the name with the
process. A name counts only if this process may see who has it: so no other user can keep a place
from root. Without /proc nobody is seen, and each name counts. Processes in other network namespaces
have other names, and are not noticed.

For any thread. A reservation does not touch what is reserved.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress

from nbdmirror import local_servers
from nbdmirror.errors import ConfigError
from nbdmirror.identity import Peer
from nbdmirror.layers import WHOLE, Layer, layers_of

TRIES = 3
"""A name may be given up while its holder is looked for."""

_held: dict[str, tuple[socket.socket, set[int]]] = {}
"""By name: the socket, and who in this process has reserved the place."""
_lock = threading.Lock()  # guards `_held`


def reserve(owner: object, places: Collection[str], what: str) -> None:
    """Reserve `places`, in addition to what `owner` has reserved. Raises ConfigError if another
    process has one of them; then `owner` has what it had before."""
    names = [_name_of(place) for place in places]
    with _lock:
        known = {name for name, (_, owners) in _held.items() if id(owner) in owners}
        try:
            for name in names:
                _reserve(id(owner), name, what)
        except ConfigError:
            _release(id(owner), set(names) - known)
            raise


def release(owner: object) -> None:
    """Give up all that `owner` has reserved. Idempotent."""
    with _lock:
        _release(id(owner), set(_held))


def places_of_peer(peer: Peer) -> set[str]:
    """The places of an export. That of an nbdmirror is known by its description; its file is the
    other process's own."""
    if peer.label:
        return {f"export {peer.label}"}
    ways: set[object] = set(peer.listeners) or {peer.server}
    places = {f"server {way} {peer.export}" for way in ways}
    storage = local_servers.sole(peer.writes(), peer.size) if peer.size else None
    return places | (set(_places_of_layers(storage.layers)) if storage else set())


def places_of_file(opened: os.stat_result) -> set[str]:
    """The places of a file or block device."""
    return set(_places_of_layers(layers_of(opened)))


def _places_of_layers(layers: list[Layer]) -> Iterator[str]:
    """Of two parts of one device each is a place of its own: what lies below them is not."""
    for layer in layers:
        if layer.range == WHOLE:
            yield f"storage {layer.thing}"


def _name_of(place: str) -> str:
    return f"nbdmirror/{hashlib.sha256(place.encode()).hexdigest()}"


def _reserve(owner: int, name: str, what: str) -> None:
    if name in _held:
        _held[name][1].add(owner)
        return
    for _ in range(TRIES):
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            bound.bind(f"\0{name}")
        except OSError as error:  # mostly because it is in use
            bound.close()
            if error.errno == errno.EADDRINUSE and not local_servers.has_proc():
                who = "another process, which is not seen without /proc"
                raise ConfigError(f"{what} is in use by {who}: mount /proc, or end it") from None
            if process := next(iter(_holders(name)), 0):
                who = f"process {process}, another nbdmirror"
                raise ConfigError(f"{what} is in use by {who} (see: nbdmirror list)") from None
        else:
            _held[name] = bound, {owner}
            return


def _release(owner: int, names: set[str]) -> None:
    for name in names & set(_held):
        bound, owners = _held[name]
        owners.discard(owner)
        if not owners:
            bound.close()
            del _held[name]


def _holders(name: str) -> frozenset[int]:
    """The process that has bound the name, if this process may see it."""
    inodes = set()
    with suppress(OSError), open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
        rows = (row.split() for row in table)
        inodes |= {int(row[-2]) for row in rows if row[-1] == f"@{name}"}
    return local_servers.holders(inodes) - {os.getpid()}
