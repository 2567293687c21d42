"""Heartbeat: notes, in memory that outlives the process, that a server is alive, and the time of
change of its disk's file. On the event loop's thread; the file is checked on the writer's thread,
since file systems may hang."""

from __future__ import annotations

from concurrent.futures import Future

from nbdmirror.state.disk_file import DiskIdentity, mtime_ns, write_alive, write_seen
from nbdmirror.state.journal import Journal
from nbdmirror.state.writer import Writer


class Heartbeat:
    """The heartbeat of one disk."""

    def __init__(self, memory: memoryview, writer: Writer, journal: Journal) -> None:
        """`memory`: ALIVE_BYTES of shared memory, beside that of `journal`."""
        self._memory = memory
        self._writer = writer
        self._journal = journal
        self._look: Future[None] | None = None

    def note_alive(self) -> None:
        """Note that the server is alive now."""
        write_alive(self._memory, self._writer.clock())

    def beat(self, identity: DiskIdentity) -> None:
        """Call this every BEAT_S seconds. Does not wait for a check in progress."""
        self.note_alive()
        if identity.inode and (self._look is None or self._look.done()):
            self._look = self._writer.submit(lambda: self._note_change(identity.source))

    def _note_change(self, source: str) -> None:
        self._journal.forget_done()
        before_s = self._writer.clock()
        write_seen(self._memory, before_s, mtime_ns(source))
