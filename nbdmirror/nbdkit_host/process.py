"""PluginProcess: one nbdmirror process, in nbdkit's order: configure, check, open, start, stop.

All errors are reported before nbdkit goes into the background: `open` opens disks and binds the
control socket. Threads start only in `start`, after the fork.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

from nbdmirror import __version__, logs
from nbdmirror import startup_error as startup
from nbdmirror.devices.aligned import for_guests
from nbdmirror.devices.base import BlockDevice, raw_device
from nbdmirror.devices.file import FileDevice
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.target_only import TargetOnly
from nbdmirror.errors import ConfigError, Error, Unreachable
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.limits import CONNECTIONS_MAX, KEEPALIVE_S_MAX, OPEN_TIMEOUT_S_MAX
from nbdmirror.local_servers import one_look
from nbdmirror.names import name_disk
from nbdmirror.nbd_uri import is_uri
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.exclusive_set import CONNECTIONS_DEFAULT
from nbdmirror.nbdclient.pair import share_storage
from nbdmirror.nbdkit_host import placement, systemd
from nbdmirror.nbdkit_host.descriptors import Descriptors
from nbdmirror.nbdkit_host.hangup import Guests, unix_listeners
from nbdmirror.nbdkit_host.keepalive import KEEPALIVE_S, Watch
from nbdmirror.nbdkit_host.latecomers import RETRY_S, Opening, handshake_s
from nbdmirror.nbdkit_host.made_files import MadeFiles
from nbdmirror.nbdkit_host.parameters import absolute_of, boolean_of, number_of, record_id_of
from nbdmirror.nbdkit_host.point_disk import Wanted, begin
from nbdmirror.nbdkit_host.signals import Signals, leave_terminal
from nbdmirror.nbdkit_host.this_host import reserve, warn_without_proc
from nbdmirror.paths import absolute_path
from nbdmirror.process_limits import check_threads
from nbdmirror.qmp.commands import dispatch, version_info
from nbdmirror.qmp.server import QmpServer
from nbdmirror.server.exports import Exports
from nbdmirror.server.server import Server
from nbdmirror.state.directory import StateDirectory
from nbdmirror.state.journaled_disk import JournaledDisk
from nbdmirror.state.store import DiskStore
from nbdmirror.subject_log import disk_log
from nbdmirror.threads import start_thread
from nbdmirror.unix_sockets import bind_unix_socket, claim_pidfile

log = logging.getLogger("nbdmirror")

GIVE_UP_S = 5.0
"""How long, at the end, guests' requests may wait for a disk's NBD server that does not answer."""

LEAVE_S = 8.0
"""How long nbdkit may wait, at the end, for guests' requests on a file that does not answer; after
that the process ends without them."""


class PluginProcess:
    def __init__(self) -> None:
        self.disks: dict[str, Disk] = {}
        self.exports = Exports(self.disks)
        self.log: logs.Log | None = None
        self._paths: dict[str, str] = {}
        self._given: set[str] = set()
        self._qmp_path = ""
        self._is_direct = False
        self._is_read_only = False
        self._mirror_to = ""
        self._journal = ""
        self._point = ""
        self._wanted: Wanted | None = None
        self._state_path = ""
        self._accepted: set[str] = set()
        self._connections = CONNECTIONS_DEFAULT
        self._stores: dict[str, DiskStore] = {}
        self._listener: socket.socket | None = None
        self._server: Server | None = None
        self._qmp: QmpServer | None = None
        self._pid = os.getpid()
        self.descriptors = Descriptors()
        self._signals = Signals()
        self._pidfile = ""
        self._made = MadeFiles()
        """The files to remove at the end, by their paths."""
        self._inherited: frozenset[str] = frozenset()
        self._open_timeout_s = 0
        self._keepalive_s = KEEPALIVE_S
        self._is_keepalive_said = False
        self._stopping = threading.Lock()
        self._is_stopped = False

    def configure(self, key: str, value: str) -> None:
        """Take one parameter from nbdkit's command line. Raises ConfigError, which names it."""
        if not value:
            raise ConfigError(f"{key}=: is empty")
        if key in self._given and key not in ("file", "accept-old-side"):
            raise ConfigError(f"{key}={value}: is given twice")
        self._given.add(key)
        if key == "file":
            self._add_disk(value)
        elif key == "qmp":
            self._qmp_path = absolute_path(value)
        elif key == "cache":
            if value not in ("writeback", "none"):
                raise ConfigError(f"cache={value}: expected writeback or none")
            self._is_direct = value == "none"
        elif key == "read-only":
            self._is_read_only = boolean_of(key, value)
        elif key == "state-dir":
            self._state_path = absolute_path(value)
        elif key == "accept-old-side":
            self._accepted.add(record_id_of(key, value))
        elif key == "keepalive":
            self._keepalive_s = number_of(key, value, 0, KEEPALIVE_S_MAX, "number of seconds")
            self._is_keepalive_said = True
        elif key == "pidfile":
            self._pidfile = absolute_path(value)
        elif key == "open-timeout":
            self._open_timeout_s = number_of(key, value, 0, OPEN_TIMEOUT_S_MAX, "number of seconds")
        elif key == "connections":
            self._connections = number_of(key, value, 1, CONNECTIONS_MAX)
        elif key == "mirror-to":
            self._mirror_to = absolute_of(key, value)
        elif key == "journal":
            self._journal = absolute_of(key, value) if is_uri(value) else absolute_path(value)
        elif key == "point":
            self._point = value
        elif key == "log-format":
            logs.use_format(value)
        else:
            raise ConfigError(
                f"unknown parameter '{key}': expected file, qmp, cache, read-only, mirror-to, "
                f"journal, point, state-dir, accept-old-side, connections, pidfile, keepalive, "
                f"open-timeout or log-format"
            )

    def check(self) -> None:
        """Check the parameters together. Raises ConfigError."""
        if not self._paths:
            raise ConfigError("parameter file=DISK is missing: name the disk to serve")
        if self._accepted and not self._state_path:
            raise ConfigError("accept-old-side: needs state-dir")
        if self._mirror_to and self._is_read_only:
            raise ConfigError("mirror-to: a read-only disk does not change; copy it with nbdcopy")
        if self._mirror_to and self._journal:
            raise ConfigError("mirror-to: not allowed with journal: first the disk becomes a point")
        self._wanted = Wanted.of(
            self._journal,
            self._point,
            images=list(self._paths.values()),
            is_read_only=self._is_read_only,
            has_state=bool(self._state_path),
        )

    def open(self) -> None:
        """Open the disks and bind the control socket. Raises ConfigError; then nothing is left
        behind that was not there before."""
        self.descriptors.raise_limit()
        warn_without_proc()
        self._inherited = frozenset(unix_listeners())
        opening = Opening(self._open_timeout_s)
        for name, path in self._paths.items():
            self.descriptors.check_start()
            source = self._open_disk(path, opening)
            if self._wanted is not None:
                source = self._wanted.on(source, opening)
            with one_look():
                self._check_other_disks(path, source)
            if not self._is_read_only and self._wanted is None:  # a point may be tried
                reserve(raw_device(source), path)
            if not source.size:
                logs.print_startup_error(f"warning: {path}: has 0 bytes; guests get an empty disk")
            disk = self.disks[name] = Disk(name, source)
            disk.ledger.latency.clock_ns = time.perf_counter_ns
        if self._qmp_path:
            is_another_ones = os.path.lexists(self._qmp_path)
            self._listener = bind_unix_socket(self._qmp_path)
            if not is_another_ones:  # who watches servers is to see that this one died, and is dead
                self._made.add(self._qmp_path)
        if self._pidfile and (made := claim_pidfile(self._pidfile, "pidfile")):
            self._made.add(self._pidfile, made)
        if self._state_path:
            self._open_state()
        self.descriptors.check_start()

    def _open_state(self) -> None:
        """Open the state directory; last, since this may create it."""
        state = StateDirectory(
            self._state_path, accepted=self._accepted, read_only=self._is_read_only
        )
        state.check_formats(self.disks)
        for name, disk in self.disks.items():
            raw, path = raw_device(disk.source), self._paths[name]
            reached, below = raw.place if isinstance(raw, NbdDevice) else (path, [])
            store = state.open(name, path, disk.size, reached=reached, below=below)
            source, size = disk.source, store.identity.size
            if store.truth:
                source = TargetOnly(source, store.truth)
            self.disks[name] = JournaledDisk(name, source, store.journal, size)
            if not self._is_read_only:  # else its state is left as it is
                self._stores[name] = store

    def _note_what_nbdkit_made(self) -> None:
        """Note nbdkit's socket, unless systemd passed it, and the pid file: nbdkit does not remove
        them."""
        for path, file in unix_listeners().items():
            if path not in (*self._inherited, self._qmp_path):
                self._made.add(path, file)
        if self._pidfile:
            self._made.add_pidfile(self._pidfile)

    def abandon(self) -> None:
        """Remove the files that were created; the process ends."""
        self._made.remove()

    def start(self, shut_down: Callable[[], None]) -> None:
        """Start threads, jobs and the control socket, after the fork. `shut_down` makes nbdkit
        end."""
        self._signals.take()
        in_background = os.getpid() != self._pid
        if in_background:
            leave_terminal()
        self.log = logs.Log(in_background=in_background)
        self._note_what_nbdkit_made()
        check_threads()
        for disk in self.disks.values():
            begin(disk)
        self._log_what_is_served()
        guests = Guests(except_listener=self._listener)
        self._end_on_signal(guests, shut_down)
        if self._keepalive_s:
            Watch(guests, self._keepalive_s, is_exact=self._is_keepalive_said).start()
        loop = Loop(time.monotonic)
        events = EventRing(time.time, loop.call_soon)
        status = systemd.Status(self.disks, events)  # also of jobs that continue
        self._server = Server(self.disks, events, loop, self._stores, connections=self._connections)
        self.exports.server = self._server
        self._server.in_use = self.exports.in_use
        self._server.start()
        if self._listener is not None:
            self._qmp = QmpServer(
                self._listener,
                dispatch=partial(dispatch, self._server),
                events=self._server.events,
                version=version_info(),
            )
            self._qmp.start()
        if self._mirror_to:
            threading.Thread(target=self._start_mirror, daemon=True).start()
        placement.start(self.disks)
        # nbdkit has already bound its sockets: clients that connect now are served.
        status.start()
        # What exists by now is there until the end. The collector begins here, and passes over
        # that: while guests are served, and when the interpreter ends.
        gc.freeze()
        gc.enable()
        startup.tell(startup.READY)

    def _log_what_is_served(self) -> None:
        log.info("nbdmirror %s, process %d", __version__, os.getpid())
        for disk in self.disks.values():
            access = "read-only" if disk.read_only else "read-write"
            where = disk.source.description
            disk_log(disk.name).info("served from %s, %d bytes, %s", where, disk.size, access)
            if isinstance(disk.source, TargetOnly):
                text = "target only: the disk is served from %s, and may be mirrored here"
                disk_log(disk.name).warning(text, disk.source.truth)
        log.info("control socket: %s", self._qmp_path or "none")
        if self._state_path:
            log.info("state directory: %s", self._state_path)

    def _end_on_signal(self, guests: Guests, shut_down: Callable[[], None]) -> None:
        def end(why: str) -> None:
            log.info("%s: the server is ending", why)
            systemd.notify(systemd.STOPPING)
            if self._server is not None:
                if not self._server.has_started.wait(LEAVE_S):  # then as if killed
                    log.error("the start does not end; the server does not wait any longer")
                    self.abandon()
                    os._exit(1)
                self._server.end_jobs()  # a guest's write may wait for a target that hangs
                for delay_s, call in ((GIVE_UP_S, self._server.give_up), (LEAVE_S, self._leave)):
                    start_thread(partial(_call_later, delay_s, call), "nbdmirror-end")
            shut_down()
            guests.hang_up(self._leave_guests)

        self._signals.end(end)

    def _leave(self) -> None:
        if not self._is_stopped:  # else nbdkit has let all guests go
            log.error("guests' requests are still in progress; the server does not wait any longer")
            self.stop()
            os._exit(1)

    def _leave_guests(self) -> None:
        """End although guests are connected: they read no answers, so nbdkit would wait for
        ever."""
        if self._server is not None and self._server.hold_changes():
            log.warning("some guests read no replies; the server does not wait for them")
            self.stop()
            os._exit(0)

    def stop(self) -> None:
        """End jobs within a bound, while clients can still see their events; then QMP; then flush
        and close the disks. Runs once."""
        with self._stopping:
            if not self._is_stopped:
                self._is_stopped = True
                self._stop()

    def _stop(self) -> None:
        systemd.notify(systemd.STOPPING)  # again, if a signal has led here
        if self._server is not None:
            self._server.end_jobs()
        if self._qmp is not None:
            self._qmp.stop()
        if self._server is not None:
            self._server.stop()
        self.abandon()
        if self.log is not None:
            self.log.stop()

    def _add_disk(self, value: str) -> None:
        try:
            name, path = name_disk(value, len(self._paths))
        except ConfigError as error:
            raise ConfigError(f"file: {error}") from error
        if name in self._paths:
            raise ConfigError(f"file={value}: there are two disks called '{name}'")
        self._paths[name] = absolute_of("file", path) if is_uri(path) else absolute_path(path)

    def _open_disk(self, path: str, opening: Opening) -> BlockDevice:
        if not is_uri(path):
            return FileDevice.open(path, read_only=self._is_read_only, direct=self._is_direct)
        device = opening.open(path)
        device.pool.limit(self._connections)
        if device.read_only and not self._is_read_only:
            raise ConfigError(f"file={path}: the export is read-only; use read-only=true")
        device.read_only = self._is_read_only
        return for_guests(device)

    def _check_other_disks(self, path: str, source: BlockDevice) -> None:
        """Raise ConfigError if `path` shares storage with another disk: writes to one would change
        the other, and no mirror would know."""
        device = raw_device(source)
        if self._is_read_only:
            return
        for name, disk in self.disks.items():
            other = raw_device(disk.source)
            if share_storage(device, other):
                is_export = isinstance(device, NbdDevice) and isinstance(other, NbdDevice)
                what = "is the same export as" if is_export else "shares storage with"
                raise ConfigError(f"file={path}: {what} disk '{name}'")

    def _start_mirror(self) -> None:
        """Start a mirror, as `drive-mirror` would. Errors are logged, since in the background no
        user sees an exception."""
        assert self._server is not None
        disk = next(iter(self.disks.values()))
        if self._server.mirrors.of(disk) is not None:
            return  # a mirror of an earlier process continues
        arguments = {
            "device": disk.name,
            "target": self._mirror_to,
            "mode": "existing",
            "sync": "full",
            "x-nbdmirror-open-timeout": handshake_s(self._open_timeout_s),
        }
        deadline_s, is_told = time.monotonic() + self._open_timeout_s, False
        while not self._is_stopped:
            try:
                asyncio.run(dispatch(self._server, "drive-mirror", arguments))
                return
            except Error as error:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not isinstance(error.__cause__, Unreachable):
                    log.error("mirror-to: %s; the disk is served without a mirror", error)
                    return
                if not is_told:
                    text = "mirror-to: %s; trying again for %.0f s (open-timeout)"
                    log.warning(text, error, left_s)
                    is_told = True
                time.sleep(min(RETRY_S, left_s))


def _call_later(delay_s: float, call: Callable[[], None]) -> None:
    time.sleep(delay_s)
    call()
