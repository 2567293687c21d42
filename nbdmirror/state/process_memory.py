"""ProcessMemory: what of one disk outlives the process in shared memory: the journal, the
heartbeat, the bitmaps, the mirror's remainder and the number of its last point. All of it or
nothing: without one part the others would be believed, and be incomplete."""

from __future__ import annotations

import mmap

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.state.disk_file import ALIVE_BYTES
from nbdmirror.state.heartbeat import Heartbeat
from nbdmirror.state.journal import JOURNAL_BYTES, Journal
from nbdmirror.state.null_store import NewBitmap
from nbdmirror.state.recent import RECENT_BYTES, REMAINDER_BYTES, ShmRemainder
from nbdmirror.state.recovery import (
    ALIVE,
    FLUSH_FAILED,
    JOURNAL,
    NEWEST_POINT,
    NEWEST_POINT_TIME,
    NUMBER_BYTES,
    RECENT,
    remainder_name,
)
from nbdmirror.state.shared_memory import ShmDirectory
from nbdmirror.state.writer import Writer
from nbdmirror.subject_log import disk_log


class ProcessMemory:
    """The memory of the disk `name`."""

    def __init__(self, name: str) -> None:
        self.journal = Journal(_private(JOURNAL_BYTES), _private(RECENT_BYTES))
        self.heartbeat: Heartbeat | None = None
        self.folder: ShmDirectory | None = None
        """None before `begin`, or if there is no such memory."""
        self._name = name
        self._newest_point = _private(NUMBER_BYTES).cast("Q")
        self._newest_point_ns = _private(NUMBER_BYTES).cast("Q")
        self._remainder = ""
        """The file of the last mirror's."""

    def begin(self, disk_id: str, writer: Writer) -> None:
        """Allocate the memory, before guests connect."""
        try:
            self.folder = folder = ShmDirectory.create(disk_id)
            alive = memoryview(folder.map(ALIVE, ALIVE_BYTES))
            requests = memoryview(folder.map(JOURNAL, JOURNAL_BYTES))
            self.journal = Journal(requests, memoryview(folder.map(RECENT, RECENT_BYTES)))
            self._newest_point = memoryview(folder.map(NEWEST_POINT, NUMBER_BYTES)).cast("Q")
            time = memoryview(folder.map(NEWEST_POINT_TIME, NUMBER_BYTES))
            self._newest_point_ns = time.cast("Q")
            self.heartbeat = Heartbeat(alive, writer.clock, self.journal)
            self.heartbeat.note_alive(writer.clock())
        except OSError as error:
            self._give_up(error)

    @property
    def path(self) -> str:
        """The folder, as the disk's record has it."""
        return str(self.folder.path) if self.folder is not None else ""

    @property
    def newest_point(self) -> tuple[int, int]:
        """The number of the mirror's last committed point, 0: none; and its wall time."""
        return self._newest_point[0], self._newest_point_ns[0]

    @newest_point.setter
    def newest_point(self, point: tuple[int, int]) -> None:
        """A kill between the two leaves the older time."""
        self._newest_point[0], self._newest_point_ns[0] = point

    def new_bitmap(self, key: str) -> NewBitmap:
        def make(size: int, granularity: int) -> DirtyBitmap:
            if self.folder is not None:
                try:
                    return self.folder.bitmap(key, size, granularity)
                except OSError as error:
                    self._give_up(error)
            return DirtyBitmap(size, granularity)

        return make

    def remainder(self, key: str) -> ShmRemainder | None:
        if self.folder is None:
            return None
        folder, name = self.folder, remainder_name(key)
        try:
            memory = memoryview(folder.map(name, REMAINDER_BYTES))
        except OSError as error:
            self._give_up(error)
            return None
        self._remainder = name
        return ShmRemainder(memory, self.journal.position, lambda: folder.remove(name))

    def keep(self) -> None:
        """The process ends, and its jobs before it: what they leave stays, in case that the process
        is killed before it has saved everything. A remainder would not be renewed for the changes
        that no mirror marks any more."""
        if self.folder is not None:
            if self._remainder:
                self.folder.remove(self._remainder)
            self.folder.is_kept = True

    def flush_failed(self) -> None:
        """The disk may lose what was not flushed, although this memory lives on: from now on the
        log of intents counts too."""
        if self.folder is not None:
            try:
                self.folder.map(FLUSH_FAILED, 1)
            except FileExistsError:
                pass
            except OSError as error:
                self._give_up(error)

    def discard(self) -> None:
        """The memory is not needed any more."""
        if self.folder is not None:
            self.folder.discard()

    def _give_up(self, error: OSError) -> None:
        text = "no shared memory: %s; a kill of the server counts as a power cut"
        disk_log(self._name).warning(text, error)
        self.discard()
        self.folder = None


def _private(length: int) -> memoryview:
    return memoryview(mmap.mmap(-1, length))
