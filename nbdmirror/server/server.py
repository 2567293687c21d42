"""Server: the disks, the target nodes, the bitmaps and the jobs of one process, and their loop.

The front ends (QMP) call it; it calls none of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Set
from functools import partial

from nbdmirror.devices.base import raw_device
from nbdmirror.disk.disk import Disk
from nbdmirror.errors import IO_ERRORS, ConfigError
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.nbdclient import tcp_watch as tcpwatch
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.exclusive_set import CONNECTIONS_DEFAULT, wait_for_handshakes
from nbdmirror.nbdclient.reservations import Questions
from nbdmirror.nbdclient.sides import wait_until_told
from nbdmirror.server.bitmaps import Bitmaps
from nbdmirror.server.chronicle import GOES_ON, SERVER_ENDS, Chronicle
from nbdmirror.server.file_watch import FileWatch
from nbdmirror.server.mirror_jobs import MirrorJobs
from nbdmirror.server.nodes import Nodes
from nbdmirror.server.old_side import OldSides
from nbdmirror.server.waiting import Waiting
from nbdmirror.state.heartbeat import Heartbeats
from nbdmirror.state.job_results import Result
from nbdmirror.state.journaled_disk import JournaledDisk
from nbdmirror.state.null_store import NullStore
from nbdmirror.state.recovery import RecoveredState
from nbdmirror.state.sealed_files import StateError
from nbdmirror.state.store import DiskStore
from nbdmirror.state.writer import Writer
from nbdmirror.subject_log import disk_log
from nbdmirror.threads import start_threads_on

log = logging.getLogger(__name__)

STOP_S_MAX = 2.0
"""How long a server that ends waits for its jobs: a forced cancel takes less than one second."""

LEAVING_S_MAX, LEAVING_LOOK_S = 0.2, 0.01
"""How long a client that has just hung up may take to disappear before the server ends."""

END_S_MAX = 5.0
"""How long, at the end, a disk's storage, and its state directory, may take to flush and close the
disk. Data that is not flushed by then is as after a kill of the server."""


class Server:
    """The parts are for the loop's thread; each method here names its thread."""

    def __init__(
        self,
        disks: dict[str, Disk],
        events: EventRing,
        loop: Loop,
        stores: Mapping[str, DiskStore] | None = None,
        *,
        connections: int = CONNECTIONS_DEFAULT,
    ) -> None:
        """`stores`: the saved state of each disk, by its name, with a state directory.
        `connections`: most connections to one target."""
        self.started_at_s = round(time.time(), 3)
        self.disks = disks
        self.events = events
        self.loop = loop
        self._disk_stores = stores or {}
        self.writers = {name: Writer(loop, events, time.time) for name in self._disk_stores}
        self.stores = {
            disk: self._disk_stores.get(name, NullStore()) for name, disk in disks.items()
        }
        """For every disk; a NullStore for a disk whose state is not saved."""
        self.nodes = Nodes(disks, connections)
        self.bitmaps = Bitmaps(self.stores)
        self.files = FileWatch(disks, events)
        self.waiting = Waiting(loop, disks.values())
        self._heartbeats = Heartbeats(loop)
        self.chronicle = Chronicle(loop, events, time.time, self._keep_result)
        self.sides = OldSides(self._disk_stores, self.writers, self._have_bitmaps)
        self.doubts: dict[str, str] = {}
        """Why the saved state of a disk was not believed at the start, by the disk's name; "" if it
        was."""
        self.has_started = threading.Event()
        self.in_use: Callable[[], Set[str]] = frozenset
        """Returns the names of the disks that clients have open."""
        self.mirrors = MirrorJobs(
            nodes=self.nodes, events=events, loop=loop, stores=self.stores, chronicle=self.chronicle
        )

    def start(self) -> None:
        """Start the loop's thread, and continue bitmaps and mirrors of an earlier process. After
        nbdkit has forked, and before guests connect. Raises ConfigError."""
        self.loop.start()
        self.loop.call_soon(partial(self.loop.attach, Questions()))
        start_threads_on(self.loop)
        for name, store in self._disk_stores.items():
            try:
                self._begin(name, store)
            except OSError as error:
                raise ConfigError(f"state-dir: {store.folder.path}: {error.strerror}") from error
        self.files.start()
        self.loop.call_soon(self._look)
        self.has_started.set()

    def _begin(self, name: str, store: DiskStore) -> None:
        disk = self.disks[name]
        store.begin(self.writers[name], disk.sync)
        assert isinstance(disk, JournaledDisk)
        disk.journal = store.journal
        self._recall_result(name, store)
        if store.found is not None:
            self.doubts[name] = store.found.problem
            self.loop.run(partial(self._take_up, disk, store.found)).result()
        store.begun()
        self.loop.call_soon(store.start)
        self.loop.call_soon(partial(self._heartbeats.add, store))

    def _look(self) -> None:
        self.loop.call_later(tcpwatch.LOOK_S, self._look)
        for device in self._remote_devices():
            device.pool.look_at_peers(self.loop.clock())
        for writer in self.writers.values():
            writer.look()
        self.waiting.look()

    @property
    def state_problem(self) -> str:
        """Why saved state is out of date; empty if it is not. For any thread."""
        return next(filter(None, (writer.problem for writer in self.writers.values())), "")

    def _keep_result(self, disk: str, result: Result) -> None:
        if (store := self._disk_stores.get(disk)) is not None:
            file = store.files["last"]

            def write() -> None:
                store.folder.prepare(file, result.to_bytes())
                store.folder.commit([file])

            self.writers[disk].submit(write)

    def _recall_result(self, disk: str, store: DiskStore) -> None:
        try:
            if (content := store.folder.read(store.files["last"])) is not None:
                self.chronicle.results[disk] = Result.from_bytes(content)
        except (OSError, StateError) as error:
            disk_log(disk).warning("the result of its last job is not known: %s", error)

    def _take_up(self, disk: Disk, found: RecoveredState) -> None:
        self.bitmaps.take_up(disk, found)
        try:
            self.mirrors.take_up(disk, found, self.bitmaps)
        except StateError as error:
            disk_log(disk.name).error("its mirror is not resumed: %s", error)
            assert found.definition.mirror is not None
            self.chronicle.not_continued(disk.name, found.definition.mirror, str(error))

    def _have_bitmaps(self, disk: Disk, found: RecoveredState) -> None:
        self.loop.run(partial(self.bitmaps.take_up, disk, found)).result()

    def cancel_jobs(self, when_done: Callable[[], None]) -> None:
        """Cancel every job by force, and dismiss all. On the loop's thread; `when_done` is called
        when the last job has ended."""
        left = set(self.mirrors.running)
        was_running = bool(left)

        def ended(job: MirrorJob) -> None:
            if not job.options.auto_dismiss:
                job.dismiss()
            left.discard(job)
            if not left:
                when_done()

        for job in list(self.mirrors.jobs.values()):
            if job in left:
                job.when_ended(partial(ended, job))
                goes_on = job.disk.name in self._disk_stores
                job.cancel(force=True, because=GOES_ON if goes_on else SERVER_ENDS)
            else:
                job.dismiss()
        if not was_running:
            when_done()

    def end_jobs(self) -> None:
        """Do `cancel_jobs` and wait for it, for STOP_S_MAX at most. State in a state directory
        stays for the next start: call this after `has_started`, since until then the state is still
        the earlier process's. For any thread but the loop's."""
        ended = threading.Event()
        self._note_clients()

        def end() -> None:
            for name, store in self._disk_stores.items():
                store.suspend(self.disks[name].ledger)
            self.cancel_jobs(ended.set)

        self.loop.call_soon(end)
        if not ended.wait(STOP_S_MAX):
            log.error("jobs did not end within %g s and are not waited for", STOP_S_MAX)

    def _note_clients(self) -> None:
        """Note which disks clients have open, before they are disconnected: such a client may come
        back after a restart."""
        disks = ((name, raw_device(self.disks[name].source)) for name in self._disk_stores)
        moved = {name for name, device in disks if isinstance(device, NbdDevice)}
        deadline_s = self.loop.clock() + LEAVING_S_MAX
        while moved & set(self.in_use()) and self.loop.clock() < deadline_s:
            time.sleep(LEAVING_LOOK_S)
        for name in self._disk_stores.keys() & self.in_use():
            self._disk_stores[name].is_left = False

    def give_up(self) -> None:
        """Make guests' requests fail that wait for another server. For any thread."""
        for disk in self.disks.values():
            device = raw_device(disk.source)
            if isinstance(device, NbdDevice) and (device.pool.is_busy or device.is_lost):
                log.error("%s: does not answer; its requests in flight fail", device.uri)
                device.pool.abandon()

    def hold_changes(self) -> bool:
        """Hold guests' changing requests from now on. Returns whether none is in progress. For any
        thread, after the jobs have ended."""
        ledgers = [disk.ledger for disk in self.disks.values()]
        for ledger in ledgers:
            if ledger.gate is None:
                ledger.close_gate(lambda: None)
        return all(ledger.is_idle for ledger in ledgers)

    def stop(self) -> None:
        """Stop the loop, flush and close the disks, and save their state, within bounds. For any
        thread but the loop's. The jobs have ended, and no guest request is in progress, or they are
        given up."""
        self.files.stop()
        start_threads_on(None)
        self.loop.stop(STOP_S_MAX)
        # A job that did not end has left its disks attached to the stopped loop.
        for device in self._remote_devices():
            device.pool.detach()
        deadline_s = self.loop.clock() + END_S_MAX
        closed: set[str] = set()
        ends = {
            name: threading.Thread(target=self._end, args=(name, closed)) for name in self.disks
        }
        for name, thread in ends.items():
            thread.daemon = True
            try:
                thread.start()
            except RuntimeError:  # no more threads
                self._end(name, closed)
        for name, thread in ends.items():
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - self.loop.clock()))
            if thread.is_alive():
                source = self.disks[name].source.description
                what = f"{source}: does not answer and is not flushed"
                if name in closed:
                    what = "the state directory does not answer: its state is not saved"
                disk_log(name).error("%s", what)
        for device in (*(node.device for node in self.nodes), *self.nodes.left):
            device.pool.abandon()
        wait_for_handshakes()
        wait_until_told()

    def _remote_devices(self) -> list[NbdDevice]:
        sources = [raw_device(disk.source) for disk in self.disks.values()]
        devices = [*sources, *(node.device for node in self.nodes), *self.nodes.left]
        return [device for device in devices if isinstance(device, NbdDevice)]

    def _end(self, name: str, closed: set[str]) -> None:
        """Flush and close one disk, on its own thread, so that only this thread waits for its
        storage. `closed` gets its name then; its state is saved after that."""
        disk, is_flushed = self.disks[name], False
        try:
            if not disk.read_only:
                disk.source.flush()
            is_flushed = True
            disk.source.close()
        except IO_ERRORS as error:
            disk_log(name).error("flush at the end failed: %s", error)
        closed.add(name)
        if name in self._disk_stores and self.writers[name].stop(END_S_MAX):
            try:
                self._disk_stores[name].finish(is_flushed=is_flushed)
            except OSError as error:
                disk_log(name).error("its state cannot be saved: %s", error)
