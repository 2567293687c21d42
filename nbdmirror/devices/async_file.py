"""FileSource: a raw disk as the copier reads it. For the event loop's thread."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress

from nbdmirror.devices.base import BlockDevice, Done, Extent, ExtentsDone, raw_device
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import IO_ERRORS, DeviceError
from nbdmirror.workers import Workers

READERS = 4
"""Threads that read uncached data. 512 MiB from a local disk: 0.8 GB/s with 1 thread, 2.2 with
2, 4.2 with 4, 4.7 with 8. The copier moves 1-2 GB/s, and each busy thread slows the guest's."""


class FileSource:
    """An AsyncSource on any blocking device, for the event loop's thread.

    Data that a file has in memory is read at once, on the loop's thread: that only copies memory,
    and a helper thread would cost two context switches for each request. Other data is read by
    READERS threads; so is all data of a device that is not a plain file (an O_DIRECT file in its
    AlignedDevice). All disks share the loop, so no call on it may wait for a storage: it must not
    even query the size or the holes of a file, which a network file system may have to ask for.

    `call_soon` posts a call to the loop's thread, from any thread. `close` closes the device.
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
        self._readers = Workers("nbdmirror-reader", READERS)

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        count = 0
        if self._file is not None:
            try:
                count = self._file.read_now(buf, offset)
                if count == len(buf) and self._file.is_whole_now():
                    done(None)
                    return
            except IO_ERRORS as error:
                done(self._unreadable(error, offset))
                return

        def read() -> None:
            try:
                self._device.pread(buf[count:], offset + count)
                self._check()
            except OSError as error:
                raise self._unreadable(error, offset) from error

        self._ask(read, done)

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """`done` is called at once only if the extents are known."""
        if self._file is not None and (known := self._file.known_extents(offset, length)):
            done(known, None)
            return
        found: list[Extent] = []

        def ask() -> None:
            found.extend(self._device.extents(offset, length))
            self._check()

        self._ask(ask, lambda error: done(None if error else found, error))

    def close(self) -> None:
        """Call nothing after this. A helper thread closes the device after the earlier requests
        have ended; nothing waits for that, since close(2) may wait as well."""

        def close() -> None:
            with suppress(OSError):  # the descriptor is closed in any case
                self._device.close()

        self._readers.submit_last(close)

    def _unreadable(self, error: BaseException, offset: int) -> BaseException:
        """The system's error alone does not say which side of a mirror has failed."""
        if not isinstance(error, OSError):
            return error
        code = error.errno or errno.EIO
        text = f"{self._device.description}: cannot be read at {offset}: {os.strerror(code)}"
        return DeviceError(text, code)

    def _check(self) -> None:
        """After a read or a query: a truncated file must not be copied as zeroes."""
        if self._checked is not None and not self._checked.is_whole_now():
            self._checked.check_whole()

    def _ask(self, call: Callable[[], None], done: Done) -> None:
        def work() -> None:
            error: BaseException | None = None
            try:
                call()
            except BaseException as caught:  # noqa: BLE001 - unreported, the copy would never end
                error = caught
            self._call_soon(lambda: done(error))

        self._readers.submit(work)
