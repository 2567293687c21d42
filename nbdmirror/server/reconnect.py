"""Reconnecting a mirror's lost target or source. On the event loop's thread; blocking work is on a
helper thread."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from functools import partial

from nbdmirror.backoff import Backoff
from nbdmirror.devices.base import Done
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.tracker import Tracker
from nbdmirror.errors import IO_ERRORS, ConfigError, DeviceError
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.spot_check import Mismatch, Read
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.pair import reserve_disk
from nbdmirror.nbdclient.shared_connection import SharedConnection
from nbdmirror.subject_log import SubjectLog
from nbdmirror.threads import NO_THREAD, start_thread

log = logging.getLogger(__name__)

PAUSE_S = 0.1, 1.0
"""First and longest pause between attempts: what a target that is back waits for at most."""


def reconnect(
    device: NbdDevice,
    loop: Loop,
    *,
    reconnect_timeout_s: float,
    is_wanted: Callable[[], bool],
    difference: Callable[[Read], Mismatch | None],
    came_back: Callable[[], None],
    done: Done,
) -> None:
    """Try to reconnect for `reconnect_timeout_s`, while `is_wanted()`. `difference` reads the
    target, on a helper thread, and returns where its data has changed, or None, or
    raises IO_ERRORS; a changed target is not used. `came_back` is called when the device has a new
    connection. Before that, the server must have answered all requests of the old connections, or
    ended these: it might carry them out later, over newer data. The error for `done` is never
    DeviceLost."""
    device.pool.reconnect_problem = ""
    device.pool.give_up()  # give up the other connections too: all are replaced
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
        elif not device.is_lost:  # an attempt from before a pause was faster
            connection.close()
            done(None)
        else:
            device.pool.replace(connection)
            came_back()
            done(None)

    if not start_thread(work, "nbdmirror-reconnect"):
        device.pool.reconnect_problem = NO_THREAD


def reconnect_source(device: NbdDevice, loop: Loop, done: Done) -> None:
    """Reconnect a source as a guest's request does, for as long as guests' requests wait. The error
    for `done` is never DeviceLost."""

    def work() -> None:
        failure = None
        try:
            device.pool.pick_shared()
        except DeviceError as error:
            failure = DeviceError(str(error), errno.EIO)
        loop.call_soon(partial(done, failure))

    start_thread(work, "nbdmirror-reconnect")


def _connect(
    device: NbdDevice,
    difference: Callable[[Read], Mismatch | None],
    clock: Callable[[], float],
    deadline_s: float,
    is_wanted: Callable[[], bool],
) -> SharedConnection:
    """Connect; blocks. Raises DeviceError at `deadline_s`, or when not `is_wanted()` any more."""
    backoff, pool = Backoff(*PAUSE_S), device.pool
    while True:
        try:
            if pool.unanswered:
                backoff.reset()
            require_answers(device)
            return _reopen(device, difference)
        except (ConfigError, *IO_ERRORS) as error:  # also of the source, which is compared
            if str(error) != pool.reconnect_problem:
                pool.reconnect_problem = str(error)
                log.warning("%s", error)
            left_s = deadline_s - clock()
            if left_s <= 0 or not device.is_lost or not is_wanted():
                raise DeviceError(str(error), errno.EIO) from error
        time.sleep(min(backoff.next_s(), left_s))
        if not is_wanted():
            raise DeviceError(pool.reconnect_problem, errno.EIO)


def require_answers(device: NbdDevice) -> None:
    """Raises DeviceError while a request of an earlier connection may still be carried out, over
    what a new connection writes."""
    if left := device.pool.unanswered:
        text = f"{device.uri}: has not answered {left} requests of the connection before"
        raise DeviceError(text, errno.EIO)


def _reopen(device: NbdDevice, difference: Callable[[Read], Mismatch | None]) -> SharedConnection:
    """Raises ConfigError or IO_ERRORS."""
    connection = device.pool.reopen()
    try:
        reserve_disk(device, connection=connection)
        mismatch = difference(device.read_by(connection))
    except BaseException:
        connection.close()
        raise
    if mismatch is not None:
        connection.close()
        raise ConfigError(f"{device.uri}: came back changed ({mismatch}); it is not written to")
    return connection


def copy_all(log: SubjectLog, tracker: Tracker, disk: Disk) -> None:
    """Copy everything again: the source may have lost writes of guests that the target has, in
    unknown places. For any thread."""
    log.warning("the source may have lost writes: everything is copied again")
    tracker.mark_all()
    disk.lose_writes(tracker.dirty)  # a mark there would count as a guest's
