"""Bringing a mirror's lost target back, or its source. On the event loop's thread; what blocks is
in a thread of its own."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from nbdmirror.backoff import Backoff
from nbdmirror.devices.base import Done
from nbdmirror.disk.tracker import Tracker
from nbdmirror.errors import ConfigError, DeviceError
from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.shared_connection import SharedConnection

log = logging.getLogger(__name__)

PAUSE_S = 0.1, 5.0
"""Between attempts: the first pause, and the longest."""


def reconnect(
    device: NbdDevice,
    loop: Loop,
    *,
    reconnect_timeout_s: float,
    is_wanted: Callable[[], bool],
    difference: Callable[[SharedConnection], int | None],
    came_back: Callable[[], None],
    done: Done,
) -> None:
    """Try for `reconnect_timeout_s`, while `is_wanted`. `difference` reports, on a helper thread,
    where the target's data differs from before; such a target is not used. `came_back` is called
    when the device has a new connection. That is not before the server has answered all requests of
    the old connections, or has ended these: it might carry them out later, over newer data. The
    error that `done` gets is not DeviceLost: waiting was tried."""
    device.reconnect_problem = ""
    device.pool.give_up()  # of several connections, the others too: all starts anew
    deadline_s = loop.clock() + reconnect_timeout_s

    def work() -> None:
        try:
            connection = _connect(device, difference, loop.clock, deadline_s, is_wanted)
        except DeviceError as error:
            failure = None if not device.is_lost else error
            loop.call_soon(partial(done, failure))
        else:
            loop.call_soon(partial(adopt, connection))

    def adopt(connection: SharedConnection) -> None:
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


def reconnect_source(device: NbdDevice, loop: Loop, done: Done) -> None:
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
    device: NbdDevice,
    difference: Callable[[SharedConnection], int | None],
    clock: Callable[[], float],
    deadline_s: float,
    is_wanted: Callable[[], bool],
) -> SharedConnection:
    """Blocks. Raises DeviceError when there is no more time, or nobody wants it any more."""
    backoff, told = Backoff(*PAUSE_S), ""
    while True:
        try:
            if left := device.pool.unanswered:
                backoff.reset()
                text = f"{device.uri}: has not answered {left} requests of the connection before"
                raise DeviceError(text, errno.EIO)
            return _reopen(device, difference)
        except (ConfigError, DeviceError) as error:
            if str(error) != told:
                told = device.reconnect_problem = str(error)
                log.warning("%s", told)
            left_s = deadline_s - clock()
            if left_s <= 0 or not device.is_lost or not is_wanted():
                raise DeviceError(str(error), errno.EIO) from error
        time.sleep(min(backoff.next_s(), left_s))


def _reopen(
    device: NbdDevice, difference: Callable[[SharedConnection], int | None]
) -> SharedConnection:
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
    tracker.mark_all()
