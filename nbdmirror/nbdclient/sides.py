"""The questions of one nbdmirror to another about a disk's sides, over NBD. A question is the name
of an export that no disk can have; the answer is that export's description. Other servers refuse
such a name, or describe something else: then the answer is unknown.

    x-nbdmirror-side/SERVER/NAME         what is the disk NAME there?
    x-nbdmirror-moved-here/SERVER/NAME   it has moved from here to you: what is it now?

SERVER is the ID of the process that asks (identity.SERVER_ID). A third name is not a question but
the export of a target only, for requests of the server that has the disk (exports.py):

    x-nbdmirror-home/SERVER/NAME

The keys and certificates are those of the disk itself. For any thread but the loop's; a question
takes as long as a handshake, at most.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
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
    return (what, server, name) if slash and what in (SIDE, MOVED_HERE, HOME) else ("", "", export)


def ask(question: str, uri: str) -> tuple[Side, str] | None:
    """The answer of the server of the export `uri`, and the server's ID; None if the answer is
    unknown. Raises ConfigError if the server cannot be reached, or is not an nbdmirror of this
    version or newer."""
    where = parse(uri)
    export = f"{question}/{SERVER_ID}/{where.export}"
    connection = SharedConnection.open(replace(where, export=export).exact, ANSWER_S_MAX)
    try:
        said = connection.peer.label.split(" ") if connection.peer is not None else []
    finally:
        connection.close()
    if len(said) != 4 or said[0] != LABEL or said[2] != export:
        return None
    return next(((side, said[1]) for side in Side if side == said[3]), None)


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
