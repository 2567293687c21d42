"""Bringing a mirror's lost target back, or its source. On the event loop's thread; what blocks is
in a thread of its own."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from nbdmirror.devices.base import Done
from nbdmirror.disk.ledger import Tracker
from nbdmirror.errors import ConfigError, DeviceError
from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient.device import RemoteDevice
from nbdmirror.nbdclient.shared_connection import Connection

log = logging.getLogger(__name__)

PAUSE_S_MIN, PAUSE_S_MAX = 0.1, 5.0
"""Back-off between attempts."""


def reconnect(
    device: RemoteDevice,
    loop: Loop,
    *,
    patience_s: float,
    is_wanted: Callable[[], bool],
    difference: Callable[[Connection], int | None],
    came_back: Callable[[], None],
    done: Done,
) -> None:
    """Try for `patience_s`, while `is_wanted`. `difference` tells, on a thread of ours, where the
    target holds something else than it did; then it is not used. `came_back` is called when the
    device has a new connection, which is not before the server has answered all that it was asked
    on the old ones, or has ended them: it might do that later, over newer data. The error that
    `done` is told is no DeviceLost: waiting was tried."""
    device.pool.give_up()  # of several connections, the others too: all starts anew
    deadline_s = loop.clock() + patience_s

    def work() -> None:
        try:
            connection = _connect(device, difference, loop.clock, deadline_s, is_wanted)
        except DeviceError as error:
            failure = None if not device.is_lost else error
            loop.call_soon(partial(done, failure))
        else:
            loop.call_soon(partial(adopt, connection))

    def adopt(connection: Connection) -> None:
        if not is_wanted():
            connection.close()
        elif not device.is_lost:  # an attempt from before a pause was first
            connection.close()
            done(None)
        else:
            device.pool.replace(connection)
            came_back()
            done(None)

    threading.Thread(target=work, name="nbdmirror-reconnect", daemon=True).start()


def reconnect_source(device: RemoteDevice, loop: Loop, done: Done) -> None:
    """As a guest's request would: for as long as those wait, and no longer. The error that `done`
    is told is no DeviceLost."""

    def work() -> None:
        failure = None
        try:
            device.pool.pick_shared()
        except DeviceError as error:
            failure = DeviceError(str(error), errno.EIO)
        loop.call_soon(partial(done, failure))

    threading.Thread(target=work, name="nbdmirror-reconnect", daemon=True).start()


def _connect(
    device: RemoteDevice,
    difference: Callable[[Connection], int | None],
    clock: Callable[[], float],
    deadline_s: float,
    is_wanted: Callable[[], bool],
) -> Connection:
    """Blocks. Raises DeviceError when there is no more time, or nobody wants it any more."""
    pause_s, told = PAUSE_S_MIN, ""
    while True:
        try:
            if left := device.pool.unanswered:
                pause_s = PAUSE_S_MIN
                text = f"{device.uri}: has not answered {left} requests of the connection before"
                raise DeviceError(text, errno.EIO)
            return _reopen(device, difference)
        except (ConfigError, DeviceError) as error:
            if str(error) != told:
                told = str(error)
                log.warning("%s", told)
            left_s = deadline_s - clock()
            if left_s <= 0 or not device.is_lost or not is_wanted():
                raise DeviceError(str(error), errno.EIO) from error
        time.sleep(min(pause_s, left_s))
        pause_s = min(PAUSE_S_MAX, pause_s * 2)


def _reopen(device: RemoteDevice, difference: Callable[[Connection], int | None]) -> Connection:
    """Raises ConfigError or DeviceError."""
    connection = device.pool.reopen()
    try:
        offset = difference(connection)
    except BaseException:
        connection.close()
        raise
    if offset is not None:
        connection.close()
        raise ConfigError(
            f"{device.uri}: came back changed (the data at {offset} differs: it is another "
            f"disk, or an older copy); it is not written to"
        )
    return connection


def copy_all(job: str, tracker: Tracker) -> None:
    """From any thread: the source may have lost what guests had written, and the target has that.
    Nobody knows where."""
    log.warning("job %s: the source may have lost writes: everything is copied again", job)
    tracker.again_bytes += tracker.size - tracker.dirty.dirty_bytes
    tracker.dirty.mark_all()
