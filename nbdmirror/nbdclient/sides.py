"""The questions of one nbdmirror to another about a disk's sides, over NBD. A question is the name
of an export that no disk can have; the answer is that export's description. Other servers refuse
such a name, or describe something else: then the answer is unknown.

    x-nbdmirror-side/SERVER/NAME         what is the disk NAME there?
    x-nbdmirror-moved-here/SERVER/NAME   it has moved from here to you: what is it now?
    x-nbdmirror-leads-to/SERVER/HOPS/DISK/NAME
                                         is what is written there passed on to DISK here? (rings.py)

SERVER is the ID of the process that asks (identity.SERVER_ID). With `journal` in place of it, DISK
is the ID of a disk in the journal that has its points: is the disk NAME there that one? One name is
not a question but the export of a target only, for requests of the server that has the disk
(exports.py):

    x-nbdmirror-home/SERVER/NAME

The keys and certificates are those of the disk itself. For any thread but the loop's; a question
takes as long as a handshake, at most.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

from nbdmirror.devices.base import Done
from nbdmirror.errors import IO_ERRORS, ConfigError
from nbdmirror.event_loop import Loop
from nbdmirror.identity import HOME, LABEL, SERVER_ID
from nbdmirror.nbd_uri import parse
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.shared_connection import SharedConnection
from nbdmirror.threads import start_thread

log = logging.getLogger(__name__)

ANSWER_S_MAX = 10.0

TOLD_S = 0.5
"""How long a mirror's end waits until the target's server is notified. This blocks the loop."""

AGAIN_S = 1.0
"""Pause between attempts to notify it."""

SIDE, MOVED_HERE = "x-nbdmirror-side", "x-nbdmirror-moved-here"
LEADS_TO = "x-nbdmirror-leads-to"

JOURNAL = "journal"
"""In place of a server's ID: the way to the disk whose points a journal has."""

HOPS_MAX = 8
"""Most servers that are asked one after the other. A ring without the asking server has no end."""

YES, NO = "yes", "no"

_telling: set[threading.Event] = set()
_is_end = threading.Event()


class Side(StrEnum):
    """The side of a disk that a server has."""

    DISK = "disk"
    """The disk, on the source that the server was started with."""
    MOVED = "moved"
    """The disk, on the target of a pivot."""
    TARGET = "target"
    """The old side, as a target only, with some old data."""
    WHOLE = "whole"
    """The old side, as a target only, of which all was written."""


def split_name(export: str) -> tuple[str, str, str]:
    """The question in the name of an export, the ID of the server that asks, and the disk's name;
    ("", "", export) for an ordinary export."""
    what, _, rest = export.partition("/")
    server, slash, name = rest.partition("/")
    is_known = slash and what in (SIDE, MOVED_HERE, LEADS_TO, HOME)
    return (what, server, name) if is_known else ("", "", export)


def ask(question: str, uri: str) -> tuple[Side, str] | None:
    """The answer of the server of the export `uri`, and the server's ID; None if the answer is
    unknown. Raises ConfigError if the server cannot be reached, or is not an nbdmirror of this
    version or newer."""
    answer, server = _answer(f"{question}/{SERVER_ID}/{parse(uri).export}", uri)
    return next(((side, server) for side in Side if side == answer), None)


def _answer(export: str, uri: str) -> tuple[str, str]:
    """The answer to the question `export`, "" if there is none, and the server's ID."""
    where = replace(parse(uri), export=export)
    connection = SharedConnection.open(where.exact, ANSWER_S_MAX)
    try:
        said = connection.peer.label.split(" ") if connection.peer is not None else []
    finally:
        connection.close()
    if len(said) != 4 or said[0] != LABEL or said[2] != export:
        return "", ""
    return said[3], said[1]


@dataclass(frozen=True, slots=True)
class Way:
    """What somebody wants to know the way to: a disk of the server that asks, or the disk whose
    points a journal has."""

    server: str
    disk: str
    """Its name there; or the ID in the journal, in hexadecimal."""
    hops: int = 0
    """Servers that have been asked so far."""

    @classmethod
    def to(cls, disk: str) -> Way:
        return cls(SERVER_ID, disk)

    @classmethod
    def to_disk_of(cls, journal: bytes) -> Way:
        """`journal`: the disk's ID in the journal."""
        return cls(JOURNAL, journal.hex())

    @classmethod
    def of(cls, server: str, words: str) -> tuple[Way, str]:
        """The way in a question's name, after the server's ID, and the disk that the question is
        about. Raises ValueError."""
        hops, disk, about = words.split("/", 2)
        return cls(server, disk, int(hops)), about


def leads_to(device: NbdDevice, way: Way) -> bool:
    """Whether what is written to `device` arrives at the disk of `way`, as far as nbdmirrors say.
    Blocks for the questions."""
    peer = device.pool.shared.peer
    said = peer.label.split(" ") if peer is not None else []
    if len(said) != 3 or way.hops == HOPS_MAX:
        return False
    _, server, disk = said
    if (server, disk) == (way.server, way.disk):
        return True
    question = f"{LEADS_TO}/{way.server}/{way.hops + 1}/{way.disk}/{disk}"
    try:
        return _answer(question, device.uri)[0] == YES
    except (ConfigError, *IO_ERRORS):
        return False


def look(uri: str) -> tuple[Side, str] | None:
    """The side at `uri`, and the server's ID; None if no nbdmirror can be reached there."""
    try:
        return ask(SIDE, uri)
    except (ConfigError, *IO_ERRORS):
        return None


def not_whole(device: NbdDevice) -> str:
    """The message why a mirror to `device`, an old side, cannot complete."""
    return (
        f"Target '{device.uri}' is the disk's old side, and some of it was not written since its "
        f"server started: mirror all of it (sync 'full', without 'target-is-zero')"
    )


def when_whole(device: NbdDevice, loop: Loop, done: Done, *, writes_all: bool) -> None:
    """Ask the server of an old side, on a helper thread, whether all of the device was written.
    `done` is called on the loop's thread: with ConfigError if not, and with another error if that
    is not known. `writes_all`: the mirror writes all of the device."""

    def check() -> None:
        failure: Exception | None = None
        try:
            said = ask(SIDE, device.uri)
            if said is None:
                failure = OSError(f"{device.uri}: its server does not report which side it has")
            elif said[0] is Side.TARGET:
                failure = ConfigError(not_whole(device))
        except (ConfigError, *IO_ERRORS) as error:
            failure = OSError(str(error))
        loop.call_soon(partial(done, failure))

    if not is_old_side(device):
        done(None)
        return
    if not writes_all:  # the target became an old side after the mirror began
        done(ConfigError(not_whole(device)))
        return
    start_thread(check, "nbdmirror-side")


def tell_moved(device: NbdDevice) -> None:
    """Notify the server of `device`, an old side, that the disk is served from `device` now, after
    the pivot is recorded. Waits for TOLD_S at most. Attempts continue until the server has
    answered, or this server ends."""
    if not is_old_side(device):
        return
    has_ended = threading.Event()
    _telling.add(has_ended)
    start_thread(partial(_tell, device.uri, has_ended), "nbdmirror-side")
    has_ended.wait(TOLD_S)


def _tell(uri: str, has_ended: threading.Event) -> None:
    told = ""
    try:
        while True:
            is_last = _is_end.is_set()
            try:
                said = ask(MOVED_HERE, uri)
                if said is not None and said[0] in (Side.TARGET, Side.WHOLE):
                    log.error("%s: %s", uri, _not_told("it stays a target only"))
                return
            except (ConfigError, *IO_ERRORS) as error:
                if str(error) != told:
                    told = str(error)
                    log.error("%s: %s", uri, _not_told(error))
            if is_last:
                return
            _is_end.wait(AGAIN_S)
    finally:
        _telling.discard(has_ended)
        has_ended.set()


def _not_told(why: object) -> str:
    return (
        f"the disk has moved there, but the server there has not been notified: {why}. If that "
        f"server is started again, it needs --accept-old-side"
    )


def wait_until_told() -> None:
    """At the server's end: wait for `tell_moved` in progress, within a bound."""
    _is_end.set()
    deadline_s = time.monotonic() + ANSWER_S_MAX
    for has_ended in tuple(_telling):
        has_ended.wait(max(0.0, deadline_s - time.monotonic()))


def is_old_side(device: NbdDevice) -> bool:
    """Whether `device` is a target only that this process may write to, as its server reported at
    the last handshake."""
    peer = device.pool.shared.peer
    return peer is not None and peer.is_home
