"""FileSource: a raw disk as the copier reads it. It belongs to the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from nbdmirror.aligned import raw_device
from nbdmirror.device import BlockDevice, Done, ExtentsDone
from nbdmirror.errors import IO_ERRORS
from nbdmirror.file import FileDevice

READERS = 4
"""Threads that read what is not cached. 512 MiB from a local disk: 0.8 GB/s with 1 thread, 2.2 with
2, 4.2 with 4, 4.7 with 8. The copier moves 1-2 GB/s, and each busy thread slows the guest's."""


class FileSource:
    """The source side of AsyncDevice on any blocking device, for the event loop's thread.

    What a file has in memory is read at once, on the loop's thread: that only copies memory, and
    handing it to a thread would cost two context switches a request. The rest goes to READERS
    threads; so does all of a device that is no plain file (an O_DIRECT file in its AlignedDevice).

    `call_soon` posts a call to the loop's thread, from any thread. The device stays the caller's.
    """

    def __init__(
        self, device: BlockDevice, call_soon: Callable[[Callable[[], None]], None]
    ) -> None:
        assert device.block_size.minimum == 1, "the copier's buffers and ranges are not aligned"
        self.size = device.size
        self._device = device
        self._file = device if isinstance(device, FileDevice) else None
        below = raw_device(device)
        self._checked = below if isinstance(below, FileDevice) else None
        self._call_soon = call_soon
        self._readers: ThreadPoolExecutor | None = None

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        count = 0
        if self._file is not None:
            try:
                count = self._file.read_now(buf, offset)
                self._check()
            except IO_ERRORS as error:
                done(error)
                return
        if count == len(buf):
            done(None)
        else:
            self._read_in_pool(buf[count:], offset + count, done)

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Asked at once: it is a look-up of metadata, bounded by EXTENTS_MAX."""
        try:
            found = self._device.extents(offset, length)
            self._check()
        except IO_ERRORS as error:
            done(None, error)
            return
        done(found, None)

    def close(self) -> None:
        """Wait for the reads under way; their `done` is posted by then."""
        if self._readers is not None:
            self._readers.shutdown()

    def _check(self) -> None:
        """After it was read or asked: a file that was truncated must not be copied as zeroes."""
        if self._checked is not None:
            self._checked.check_whole()

    def _read_in_pool(self, buf: memoryview, offset: int, done: Done) -> None:
        def work() -> None:
            error: BaseException | None = None
            try:
                self._device.pread(buf, offset)
                self._check()
            except BaseException as caught:  # noqa: BLE001 - untold, the copy would never end
                error = caught
            self._call_soon(lambda: done(error))

        if self._readers is None:
            # Not before the first read that needs it: nbdkit forks after the start (FACTS 5).
            self._readers = ThreadPoolExecutor(READERS, "nbdmirror-reader")
        self._readers.submit(work)
