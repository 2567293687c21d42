"""Reservations: what this process writes to as a disk or a target is no other nbdmirror's of this
host.

Two mirrors to one export make a target of two halves, and a mirror to another server's disk
overwrites that disk; each of them looks well. So a process listens on an abstract Unix socket for
each place that it writes to, whose name says which place that is. The kernel removes the name with
the process, and tells whoever connects which user has it. A name counts if that user is this
process's, or root, or if this process is root's: so a user cannot keep a place from another one.
That process itself is not always seen: it may have its own /proc, or its own users. Processes in
other network namespaces have other names, and are not noticed.

For any thread. A reservation does not touch what is reserved.
"""

from __future__ import annotations

import errno
import hashlib
import os
import select
import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import suppress

from nbdmirror import local_servers
from nbdmirror.errors import ConfigError
from nbdmirror.identity import Peer, peer_credentials
from nbdmirror.layers import WHOLE, Layer, layers_of

TRIES = 3
"""A name may be given up while its holder is looked for."""

LISTENS_S_MAX = 0.02
"""The process that has just bound a name listens after this time."""

BACKLOG = 4096
"""Questions that nobody has taken yet. One more is not answered, and then the name counts."""

ROOT = 0
UNMAPPED = 65534
"""A user who has no number here, since this process has its own users. (user_namespaces(7))"""

_held: dict[str, tuple[socket.socket, set[int]]] = {}
"""By name: the socket, and who in this process has reserved the place."""
_lock = threading.Lock()  # guards `_held`
_questions = select.epoll()
"""The sockets, for `Questions`."""


class Questions:
    """Takes the connections of processes that ask who has a name, for the event loop. The kernel
    has answered them."""

    def fileno(self) -> int:
        return _questions.fileno()

    def poll_mask(self) -> int:
        return select.POLLIN

    def on_ready(self, mask: int) -> None:
        for bound, _ in list(_held.values()):
            with suppress(OSError):  # nobody has asked, or it is given up
                bound.accept()[0].close()


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
    storage = peer.storage
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
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            bound.bind(f"\0{name}")
            bound.listen(BACKLOG)
        except OSError as error:  # mostly because it is in use
            bound.close()
            if error.errno == errno.EADDRINUSE and (who := _holder(name)):
                raise ConfigError(f"{what} is in use by {who}") from None
        else:
            _held[name] = bound, {owner}
            _questions.register(bound, select.EPOLLIN)
            return


def _release(owner: int, names: set[str]) -> None:
    for name in names & set(_held):
        bound, owners = _held[name]
        owners.discard(owner)
        if not owners:
            bound.close()
            del _held[name]


def _holder(name: str) -> str:
    """Who has bound the name; "" if nobody has, or if the name does not count."""
    if process := next(iter(_processes_with(name)), 0):
        return f"process {process}, another nbdmirror (see: nbdmirror list)"
    if not local_servers.has_proc():
        return "another process, which is not seen without /proc: mount /proc, or end it"
    return "another nbdmirror, whose process is not seen from here" if _counts(name) else ""


def _processes_with(name: str) -> frozenset[int]:
    """The process that has bound the name, if this process may see it."""
    inodes, names = set(), "/proc/self/net/unix"  # not /proc/net: a smaller /proc has none
    with suppress(OSError), open(names, encoding="utf-8", errors="replace") as table:
        rows = (row.split() for row in table)
        inodes |= {int(row[-2]) for row in rows if row[-1] == f"@{name}"}
    return local_servers.holders(inodes) - {os.getpid()}


def _counts(name: str) -> bool:
    """Whether the name is of a user whose reservations count, or of one who does not answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as question:
        try:
            question.connect(f"\0{name}")
        except BlockingIOError:
            return True
        except OSError:  # given up, not listening yet, or an older version's
            time.sleep(LISTENS_S_MAX)
            return False
        _, user, _ = peer_credentials(question)
    return os.geteuid() == ROOT or user in (ROOT, UNMAPPED, os.geteuid())
