"""A disk for a command that has no server to ask: if a request gets no answer for a while, the
command says so, and goes on waiting."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from nbdmirror.amounts import duration
from nbdmirror.cli.streams import say
from nbdmirror.cli.words import SILENT_S
from nbdmirror.devices.base import BlockDevice, Buffer, Extent, Wrapper
from nbdmirror.threads import start_thread


class Attended(Wrapper):
    """Calls are for one thread at a time. Said after SILENT_S, and again after each doubling."""

    def __init__(self, inner: BlockDevice, clock: Callable[[], float] = time.monotonic) -> None:
        self.inner = inner
        self.description = inner.description
        self.size = inner.size
        self.read_only = inner.read_only
        self.block_size = inner.block_size
        self._clock = clock
        self._since_s: float | None = None
        """When the request in progress began."""
        self._due_s = SILENT_S
        self._closed = threading.Event()
        start_thread(self._attend, "nbdmirror-attended")

    def pread(self, buf: memoryview, offset: int) -> None:
        with self._asking():
            self.inner.pread(buf, offset)

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        with self._asking():
            self.inner.pwrite(buf, offset, fua)

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_trim: bool = False,
        fua: bool = False,
        fast: bool = False,
    ) -> None:
        with self._asking():
            self.inner.zero(offset, length, may_trim=may_trim, fua=fua, fast=fast)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        with self._asking():
            self.inner.trim(offset, length, fua=fua)

    def flush(self) -> None:
        with self._asking():
            self.inner.flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        with self._asking():
            return self.inner.extents(offset, length)

    def cache(self, offset: int, length: int) -> None:
        with self._asking():
            self.inner.cache(offset, length)

    def close(self) -> None:
        self._closed.set()
        self.inner.close()

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        self._due_s, self._since_s = SILENT_S, self._clock()
        try:
            yield
        finally:
            self._since_s = None

    def _attend(self) -> None:
        while not self._closed.wait(1.0):
            self.look()

    def look(self) -> None:
        """Call this about once a second."""
        since_s = self._since_s
        if since_s is not None and (silent_s := self._clock() - since_s) >= self._due_s:
            self._due_s = 2 * silent_s
            text = f"has not answered for {duration(silent_s)}; check its server"
            say(f"nbdmirror: {self.description}: {text}")
