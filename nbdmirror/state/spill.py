"""SpillFile: where content goes that guests overwrite before it was read for a point, and for which
memory has no room (disk/saved.py).

The file has no name: nothing of it is left after a kill, when its point is given up in any case.
The file system may hang: a thread of the file's own creates the file, and guests that need it wait.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import IO

from nbdmirror.devices.base import Done
from nbdmirror.disk.saved import Spill
from nbdmirror.workers import Workers


class SpillFile(Spill):
    """A file of at most `size` bytes in `folder`. `call_soon` posts a call to the event loop's
    thread. If the file cannot be created `failed` is called, on any thread, and writes fail."""

    def __init__(
        self,
        folder: Path,
        size: int,
        call_soon: Callable[[Callable[[], None]], None],
        failed: Callable[[OSError], None],
    ) -> None:
        self.size = size
        self._call_soon = call_soon
        self._file: Future[IO[bytes]] = Future()
        self._readers = Workers("nbdmirror-spill", 1)
        self._readers.submit(partial(self._create, folder, failed))
        self._lock = threading.Lock()  # a leaf, for what follows
        self._writers = 0
        self._is_closing = self._is_read = False

    def _create(self, folder: Path, failed: Callable[[OSError], None]) -> None:
        try:
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - until `close`
        except OSError as error:
            self._file.set_exception(error)
            failed(error)
        else:
            self._file.set_result(file)

    @property
    def _fd(self) -> int:
        """Waits until the file is there. Raises OSError if it cannot be created."""
        return self._file.result().fileno()

    def write(self, content: bytes, place: int) -> None:
        with self._lock:
            if self._is_closing:
                raise OSError(errno.EBADF, "the spill file is closed")
            self._writers += 1
        try:
            view, fd = memoryview(content), self._fd
            while view:
                count = os.pwrite(fd, view, place)
                view, place = view[count:], place + count
        finally:
            with self._lock:
                self._writers -= 1
                self._close_if_unused()

    def start_read(self, buf: memoryview, place: int, done: Done) -> None:
        def read() -> None:
            error: BaseException | None = None
            try:
                self._read(buf, place)
            except OSError as caught:
                error = caught
            self._call_soon(lambda: done(error))

        self._readers.submit(read)

    def close(self) -> None:
        """Free the file's space, after the reads and writes in progress. Later writes fail; begin
        no read."""

        def no_reads() -> None:
            with self._lock:
                self._is_read = True
                self._close_if_unused()

        with self._lock:
            self._is_closing = True
        self._readers.submit_last(no_reads)

    def _close_if_unused(self) -> None:
        """With the lock held. (Another file may get the number of a closed one.)"""
        if self._is_read and not self._writers and self._file.exception() is None:
            self._file.result().close()

    def _read(self, buf: memoryview, place: int) -> None:
        while buf:
            count = os.preadv(self._fd, (buf,), place)
            if not count:
                raise OSError(errno.EIO, "the spill file is too short")
            buf, place = buf[count:], place + count
