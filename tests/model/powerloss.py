"""A world (world.py) whose mirror is kept in a state directory, and that may end at any moment.

After each step two ends are looked at: the process is killed, and the power fails. For each the
state is recovered by the real code from what is left, and must tell all that may differ then:

 - a killed process leaves the disk as guests wrote it, and memory that outlives it;
 - a power cut takes back, of what was not flushed, anything it likes: of the disk, of the target if
   that fails as well, and of the state directory's files.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from model.parts import Guest
from model.world import World
from support.staterecords import MIRROR

import nbdmirror.state.intent_log
import nbdmirror.state.journal
import nbdmirror.state.process_memory
import nbdmirror.state.store
from nbdmirror.devices.base import Done
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.state.disk_file import DiskIdentity
from nbdmirror.state.intent_log import IntentLog, slot_bytes
from nbdmirror.state.journal import Journal, Regions, ranges_left
from nbdmirror.state.recent import ENTRY
from nbdmirror.state.recovery import RecoveredState, names, recover
from nbdmirror.state.sealed_files import Folder, Slots
from nbdmirror.state.shared_memory import ShmDirectory
from nbdmirror.state.store import DiskStore

REGION_BYTES = 1024
REQUESTS_MAX = 8
JOURNAL_BYTES = REQUESTS_MAX * 16
RECENT_MAX = 16
RECENT_BYTES = RECENT_MAX * ENTRY.size
KEY = "mirror-1"
DISK = DiskIdentity("/nowhere/disk", 0)


class SimSlots(Slots):
    """`durable` are contents that a power cut leaves; a slot that was written without sync has an
    older and a newer one."""

    def __init__(self, count: int) -> None:
        self.content = [b""] * count
        self.durable = [b""] * count

    def write(self, index: int, content: bytes, *, sync: bool) -> None:
        self.content[index] = content
        if sync:
            self.durable = list(self.content)

    def read(self, index: int) -> bytes:
        return self.content[index]

    def close(self) -> None:
        pass

    def after_power_cut(self) -> list[SimSlots]:
        """What may be left: each slot as it was last synced, or as it is. Sectors of both are
        test_intent_log.py's affair."""
        left = []
        for index, (old, new) in enumerate(zip(self.durable, self.content, strict=True)):
            for content in {old, new}:
                slots = SimSlots(len(self.content))
                slots.content = [
                    content if number == index else one for number, one in enumerate(self.durable)
                ]
                left.append(slots)
        return left


class SimFolder(Folder):
    """Files in memory. `commit` is what makes them last; it is one step here, and what is prepared
    and not committed is not there after a crash."""

    path = Path("/state")

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.prepared: dict[str, bytes] = {}
        self.logs: dict[str, SimSlots] = {}

    def read(self, name: str) -> bytes | None:
        return self.files.get(name)

    def prepare(self, name: str, content: bytes) -> None:
        self.prepared[name] = content

    def commit(self, names: list[str], removed: list[str] | None = None) -> None:
        for name in names:
            self.files[name] = self.prepared.pop(name)
        for name in removed or ():
            self.files.pop(name, None)

    def refuse(self, name: str) -> None:
        self.files.pop(name, None)

    def slots(self, name: str, slot_bytes: int, count: int) -> Slots:
        return self.logs.setdefault(name, SimSlots(count))


class StepWriter:
    """In place of Writer: what was submitted waits for `step`."""

    def __init__(self, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        self.calls: list[Callable[[], None]] = []
        self.now_s = 0.0
        self._call_later = call_later

    def clock(self) -> float:
        return self.now_s

    def submit(self, call: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()

        def work() -> None:
            call()
            future.set_result(None)

        self.calls.append(work)
        return future

    flush = submit  # what a checkpoint writes is submitted after its flush

    def then(self, future: Future[None], done: Done) -> None:
        future.add_done_callback(lambda future: done(future.exception()))

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self._call_later(delay_s, call)

    def failed(self, error: BaseException) -> None:
        raise AssertionError(error)

    def step(self) -> None:
        if self.calls:
            self.calls.pop(0)()


def _no_memory(_: str) -> None:
    raise OSError(0, "not in this test")


BOUNDS: tuple[tuple[object, str, object], ...] = (
    (nbdmirror.state.journal, "REQUESTS_MAX", REQUESTS_MAX),
    (nbdmirror.state.journal, "RECENT_MAX", RECENT_MAX),
    (nbdmirror.state.process_memory, "JOURNAL_BYTES", JOURNAL_BYTES),
    (nbdmirror.state.intent_log, "REGION_BYTES_MIN", REGION_BYTES),
    (nbdmirror.state.intent_log, "REGION_BYTES_MAX", REGION_BYTES),
    (ShmDirectory, "create", _no_memory),
)
"""Module or class, name and value, in place of what a server has."""


def begun_store(
    folder: SimFolder, identity: DiskIdentity, writer: Any, flush_source: Callable[[], None]
) -> DiskStore:
    """The state of a disk that was never kept before."""
    log = folder.slots(names("disk")["intents"], slot_bytes(identity.size), 2)
    store = DiskStore(
        name="disk", identity=identity, folder=folder, slots=log, found=None, pivoted=None
    )
    store.begin(writer, flush_source)
    store.begun()
    store.start()
    return store


class PowerCuts:
    """What is told to differ after a power cut. Each state directory is recovered once: most steps
    change nothing there."""

    def __init__(
        self, identity: DiskIdentity, told: Callable[[RecoveredState], DirtyBitmap]
    ) -> None:
        self._identity = identity
        self._told = told
        self._known: dict[object, DirtyBitmap | None] = {}

    def told(self, files: dict[str, bytes], log: SimSlots) -> DirtyBitmap | None:
        """None: there is no mirror, and nobody was told that it goes on."""
        key = (tuple(log.content), *files.items())
        if key not in self._known:
            folder = SimFolder()
            folder.files = dict(files)
            folder.logs = {names("disk")["intents"]: log}
            found = recover(folder, "disk", self._identity)
            has_mirror = found is not None and found.definition.mirror is not None
            self._known[key] = self._told(found) if found is not None and has_mirror else None
        return self._known[key]


class PowerWorld(World):
    """Mutants override what they break."""

    journal_class: type[Journal] = Journal
    regions_class: type[Regions] = Regions
    flushes_source = True

    def __init__(self, content: bytes, **options: Any) -> None:
        super().__init__(content, **options)
        self.durable_source = bytearray(content)
        self.slots: dict[Guest, int] = {}
        self.folder = SimFolder()
        self.writer = StepWriter(self.loop.call_later)
        self.identity = DiskIdentity(DISK.source, self.size)
        patches: tuple[tuple[object, str, object], ...] = (
            *BOUNDS,
            (nbdmirror.state.store, "Regions", self.regions_class),
            (nbdmirror.state.process_memory, "Journal", self._new_journal),
        )
        for module, name, value in patches:
            self._patches.enter_context(patch.object(module, name, value))
        self.store = begun_store(self.folder, self.identity, self.writer, self.flush_source)
        self.power_cuts = PowerCuts(self.identity, self.recover)

    def _new_journal(self, *_: memoryview) -> Journal:
        self.recent = bytearray(RECENT_BYTES)
        return self.journal_class(memoryview(bytearray(JOURNAL_BYTES)), memoryview(self.recent))

    def flush_source(self) -> None:
        if self.flushes_source:
            self.durable_source[:] = self.source

    def mark_all(self) -> None:
        super().mark_all()
        record = replace(MIRROR, key=KEY, granularity=self.granularity)
        self.store.keep_mirror(record, {KEY: self.tracker})

    # Guests write down what they are about to do first, and last that it is done.

    def enter(self, guest: Guest) -> int:
        if guest not in self.slots:
            self.slots[guest] = self.store.journal.begin(guest.offset, guest.length)
        return super().enter(guest)

    def step_guest(self, guest: Guest, *, fail: bool = False) -> None:
        super().step_guest(guest, fail=fail)
        if guest not in self.guests and guest in self.slots:
            self.store.journal.end(self.slots.pop(guest))

    # What must hold.

    def check(self) -> None:
        super().check()
        if self.is_tracking:
            self.check_kill()
            for log in self.folder.logs[names("disk")["intents"]].after_power_cut():
                self.check_power_cut(log)

    def check_kill(self) -> None:
        dirty = self.tracker.may_differ()
        for offset, length in ranges_left(bytes(self.store.journal._cells.cast("B"))):
            dirty.mark(offset, length)
        self._check_told(dirty, [self.source], "a killed process")
        if names("disk")["bitmaps"] in self.folder.files:
            self.check_kill_of_both(dirty)

    def check_kill_of_both(self, dirty: DirtyBitmap) -> None:
        """The disk is on an NBD server, which has ended as well. `dirty`: what the memory tells."""
        log: Any = self.folder.logs[names("disk")["intents"]]
        disk_id = self.store._disk_id
        for offset, length in IntentLog.read(log, disk_id=disk_id, size=self.size).ranges():
            dirty.mark(offset, length)
        what = "a killed process, and its source's server"
        self._check_told(dirty, [self.source, self.durable_source], what)

    def check_power_cut(self, log: SimSlots) -> None:
        dirty = self.power_cuts.told(self.folder.files, log)
        if dirty is not None:
            self._check_told(dirty, [self.source, self.durable_source], "a power cut")

    def recover(self, found: RecoveredState) -> DirtyBitmap:
        dirty = DirtyBitmap(self.size, self.granularity)
        found.restore(dirty, KEY)
        return dirty

    def _check_told(self, dirty: DirtyBitmap, sources: list[bytearray], what: str) -> None:
        """`sources`: what the disk may hold, in each of its parts, beside `what`. The target has
        failed as well, or it has not."""
        for offset in range(0, self.size, self.granularity):
            granule = slice(offset, min(offset + self.granularity, self.size))
            targets = (self.target, self.devices.durable)
            contents = {bytes(one[granule]) for one in (*sources, *targets)}
            assert len(contents) == 1 or dirty.is_dirty(offset, granule.stop - granule.start), (
                f"lost in {what}: the granule at {offset}"
            )

    def drain(self) -> None:
        super().drain()
        while self.writer.calls:
            self.writer.step()
