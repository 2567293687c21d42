"""DurableExport: an NBD export as the programs of `nbdmirror/points/` use it, on the event loop."""

from __future__ import annotations

from collections.abc import Callable

import nbd

from nbdmirror.devices.base import AsyncSource, AsyncTarget, Done, ExtentsDone, all_of, pieces
from nbdmirror.errors import DeviceLost
from nbdmirror.nbdclient.block_status import LENGTH_MAX
from nbdmirror.nbdclient.device import NbdDevice


class DurableExport(AsyncSource, AsyncTarget):
    """An NbdDevice with writes that are durable, and trims, for the event loop's thread.

    It lives as long as the device's connection: after a reconnect each request fails with
    DeviceLost, since the server may have lost what a flush on the new connection would not cover.
    """

    def __init__(self, device: NbdDevice) -> None:
        """The device is attached to the loop, and stays its owner's."""
        self.description = device.description
        self.size = device.size
        self._device = device
        self._generation = device.pool.generation

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        def read(start: int, length: int, then: Done) -> None:
            self._device.start_read(buf[start : start + length], offset + start, then)

        self._start_pieces(read, len(buf), self._device.block_size.maximum, done)

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        self._device.start_extents(offset, length, done)

    def start_write(self, buf: memoryview, offset: int, done: Done) -> None:
        self._start_write(buf, offset, 0, done)

    def start_durable_write(self, buf: memoryview, offset: int, done: Done) -> None:
        """As `start_write`; durable at the end."""
        if self._device.announced.can_fua:
            self._start_write(buf, offset, int(nbd.CMD_FLAG_FUA), done)
            return

        def flush(error: BaseException | None) -> None:
            if error is None:
                self.start_flush(done)
            else:
                done(error)

        self._start_write(buf, offset, 0, flush)

    def start_zero(self, offset: int, length: int, may_trim: bool, done: Done) -> None:
        if not self._is_lost(done):
            self._device.start_zero(offset, length, may_trim, done)

    def start_trim(self, offset: int, length: int, done: Done) -> None:
        """A hint: done without an error if the server has no trim."""
        if not self._device.announced.can_trim:
            done(None)
            return

        def trim(start: int, span: int, then: Done) -> None:
            connection = self._device.pool.shared
            connection.start(connection.handle.aio_trim, span, offset + start, done=then)

        self._start_pieces(trim, length, LENGTH_MAX, done)

    def start_flush(self, done: Done) -> None:
        if not self._is_lost(done):
            self._device.start_flush(done)

    def _start_write(self, buf: memoryview, offset: int, flags: int, done: Done) -> None:
        def write(start: int, length: int, then: Done) -> None:
            connection, part = self._device.pool.shared, buf[start : start + length]
            connection.start(
                connection.handle.aio_pwrite, part, offset + start, flags=flags, done=then
            )

        self._start_pieces(write, len(buf), self._device.block_size.maximum, done)

    def _start_pieces(
        self, start: Callable[[int, int, Done], None], length: int, length_max: int, done: Done
    ) -> None:
        """Start a request for each piece of `length` bytes. `done` with the first error."""
        if self._is_lost(done):
            return
        if length <= length_max:
            start(0, length, done)
            return
        parts = pieces(0, length, length_max)
        ended = all_of(len(parts), done)
        for at, span in parts:
            start(at, span, ended)

    def _is_lost(self, done: Done) -> bool:
        """Whether the connection is another one by now; then `done` is called with that error."""
        if self._generation == self._device.pool.generation:
            return False
        done(DeviceLost(f"{self.description}: the connection was lost meanwhile"))
        return True
