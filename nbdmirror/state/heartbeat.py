"""Heartbeats: note, in memory that outlives the process, that a server is alive, and the time of
change of each disk's file.

One timer for all disks, and one call for all files of a file system: a hundred disks wake the
process as often as one. On the event loop's thread; files are checked on a thread for each file
system, since file systems may hang.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from nbdmirror.event_loop import Loop
from nbdmirror.state.disk_file import DiskIdentity, mtime_ns, write_alive, write_seen
from nbdmirror.state.journal import Journal
from nbdmirror.workers import Workers

BEAT_S = 0.25
"""Interval at which the server notes that it is alive, and checks the files of disks that guests
have changed since the last check."""

IDLE_BEATS = 8
"""At every so many beats the files of all disks are checked."""


class Heartbeat:
    """The heartbeat of one disk."""

    def __init__(self, memory: memoryview, clock: Callable[[], float], journal: Journal) -> None:
        """`memory`: ALIVE_BYTES of shared memory, beside that of `journal`. `clock`: wall-clock
        seconds."""
        self._memory = memory
        self.clock = clock
        self._journal = journal

    def note_alive(self, time_s: float) -> None:
        """Note that the server is alive at `time_s`, of `clock`."""
        write_alive(self._memory, time_s)

    @property
    def is_changed(self) -> bool:
        """A guest has changed something since the last check, or is about to."""
        return not self._journal.is_forgotten

    def check(self, source: str) -> None:
        """Note the time of change of the disk's file. From one thread at a time; may wait for the
        file system."""
        self._journal.forget_done()
        before_s = self.clock()
        write_seen(self._memory, before_s, mtime_ns(source))


class Beating(Protocol):
    """A disk whose state is saved."""

    @property
    def identity(self) -> DiskIdentity:
        """The disk's source, which is another one after a pivot."""

    @property
    def heartbeat(self) -> Heartbeat | None:
        """None without memory that outlives the process."""


def _new_thread() -> Workers:
    return Workers("nbdmirror-heartbeat", 1)


class Heartbeats:
    """The heartbeats of a server's disks."""

    def __init__(self, loop: Loop, new_thread: Callable[[], Workers] = _new_thread) -> None:
        """`new_thread` makes what runs the calls for one file system."""
        self._loop = loop
        self._new_thread = new_thread
        self._disks: list[Beating] = []
        self._beats = 0
        self._threads: dict[int, Workers] = {}
        """By the file system's device number."""
        self._checking: set[int] = set()
        """The file systems that a check waits for; their threads take them out."""

    def add(self, disk: Beating) -> None:
        """This disk's heart beats from now on."""
        self._disks.append(disk)
        if len(self._disks) == 1:
            self._beat()

    def _beat(self) -> None:
        self._loop.call_later(BEAT_S, self._beat)
        is_everyones, self._beats = self._beats % IDLE_BEATS == 0, self._beats + 1
        due: dict[int, list[Callable[[], None]]] = {}
        now_s: float | None = None
        for disk in self._disks:  # often, and for a hundred disks: nothing is done twice
            if (heartbeat := disk.heartbeat) is None:
                continue
            if now_s is None:
                now_s = heartbeat.clock()
            heartbeat.note_alive(now_s)
            if (is_everyones or heartbeat.is_changed) and (identity := disk.identity).inode:
                check = partial(heartbeat.check, identity.source)
                due.setdefault(identity.device, []).append(check)
        for device, checks in due.items():
            self._check(device, checks)

    def _check(self, device: int, checks: list[Callable[[], None]]) -> None:
        """Do the checks on one file system, unless it has not answered the last ones yet."""
        if device in self._checking:
            return
        self._checking.add(device)

        def run() -> None:
            try:
                for check in checks:
                    check()
            finally:
                self._checking.discard(device)

        if device not in self._threads:
            self._threads[device] = self._new_thread()
        self._threads[device].submit(run)
