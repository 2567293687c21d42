"""A DiskStore in a real state directory, with its writer's thread, and a loop in place of the
server's."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from support.staterecords import MIRROR
from support.waiting import WAIT_S_MAX

from nbdmirror.devices.base import Done
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.state.directory import StateDirectory
from nbdmirror.state.disk_record import BitmapRecord
from nbdmirror.state.intent_log import IntentLog
from nbdmirror.state.sealed_files import DiskFolder
from nbdmirror.state.store import DiskStore
from nbdmirror.state.writer import Writer

SIZE, GRANULARITY = 1 << 20, 1 << 16

Result = TypeVar("Result")


class Level:
    """A mirror whose target has all that `dirty` has not."""

    is_at_rest = True

    def __init__(self, dirty: DirtyBitmap) -> None:
        self.dirty = dirty

    def may_differ(self) -> DirtyBitmap:
        return self.dirty.copy()


class World:
    """The processes of one disk, one after the other: `opened` is one of them."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.image = folder / "disk.img"
        self.image.write_bytes(bytes(SIZE))
        self.loop = Loop(time.monotonic)
        self.loop.start()
        self.events = EventRing(time.time, self.loop.call_soon)
        self.store: DiskStore
        """That of the present process."""

    def do(self, call: Callable[[], Result]) -> Result:
        return self.loop.run(call).result(WAIT_S_MAX)

    @contextmanager
    def opened(self) -> Iterator[DiskStore]:
        """A process that has checked the disk, and is about to begin. It ends as if killed."""
        self.store = store = StateDirectory(str(self.state), accepted=()).open(
            "vda", str(self.image), SIZE
        )
        self.writer = Writer(self.loop, self.events, time.time)
        try:
            yield store
        finally:
            self.writer.stop(WAIT_S_MAX)
            assert isinstance(store.folder, DiskFolder)
            store.folder.close()
            memory = store._memory.folder
            if memory is not None and memory._fd >= 0:
                os.close(memory._fd)
                memory._fd = -1

    def begin(self) -> None:
        self.store.begin(self.writer, lambda: None)
        self.store.begun()

    @property
    def definition(self) -> dict[str, Any]:
        """NAME.json; empty if there is none."""
        file = self.state / "vda.json"
        return json.loads(file.read_text().partition("\n")[2]) if file.exists() else {}

    @property
    def kept(self) -> tuple[bool, list[str]]:
        """Whether there is a mirror, and the names of the bitmaps."""
        self.store.saved().result(WAIT_S_MAX)
        found = self.definition
        return bool(found.get("mirror")), [one["name"] for one in found.get("bitmaps", [])]

    @property
    def regions_on_disk(self) -> bytes:
        """The log of intents: one byte for each region."""
        store = self.store
        return IntentLog.read(store._slots, disk_id=store._disk_id, size=SIZE).regions

    def add_mirror(self) -> None:
        record = replace(MIRROR, granularity=GRANULARITY)
        dirty = self.store.new_bitmap(record.key)(SIZE, GRANULARITY)
        self.store.keep_mirror(record, {record.key: Level(dirty)})

    def add_bitmap(self, name: str) -> None:
        record = BitmapRecord(name, GRANULARITY, True, f"bitmap-{name}")
        self.store.keep_bitmap(record, self.store.new_bitmap(record.key)(SIZE, GRANULARITY))

    def drop_bitmap(self, name: str) -> None:
        self.store.drop_bitmap(f"bitmap-{name}")

    def ask(self, call: Callable[[Done], None], *beside: Callable[[], None]) -> Any:
        """The error that `call` tells, or None. `beside` is done in the same step of the loop."""
        told: Future[BaseException | None] = Future()

        def all_calls() -> None:
            call(told.set_result)
            for one in beside:
                one()

        self.do(all_calls)
        return told.result(WAIT_S_MAX)
