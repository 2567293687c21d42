"""Zeroes and trims of an NBD device: in pieces, without what the server does not announce, and
without what it refuses although it announces no blocks.

nbdkit and qemu-nbd pass zeroes and trims on to a block device, which refuses what is not aligned to
its blocks of 512 or 4,096 bytes (EINVAL). They write at any place. So after such a refusal the
edges of a range are written as zeroes, and not trimmed; the units between them are done as before.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

import nbd

from nbdmirror.devices.base import Done, pieces
from nbdmirror.errors import DeviceError
from nbdmirror.nbdclient.block_status import LENGTH_MAX

if TYPE_CHECKING:
    from nbdmirror.nbdclient.device import NbdDevice

UNIT = 4096
ZEROES_BYTES_MAX = 1 << 20
"""Zeroes that are written as data in one request."""

Part = tuple[int, int]
"""Offset and length in bytes."""


def is_odd(part: Part) -> bool:
    return bool((part[0] | part[1]) % UNIT)


def is_refusal(error: BaseException | None, part: Part) -> bool:
    """Whether a request for this range has failed because of its place."""
    is_invalid = isinstance(error, DeviceError) and error.errno == errno.EINVAL
    return is_invalid and is_odd(part)


def split(part: Part) -> list[Part]:
    """The edges of a range, each in one unit, and the units between them."""
    offset, end = part[0], sum(part)
    start, stop = -(-offset // UNIT) * UNIT, end // UNIT * UNIT
    if start > stop:
        return [part]
    found = [(offset, start - offset), (start, stop - start), (stop, end - stop)]
    return [one for one in found if one[1]]


class Zeroing:
    """The zeroes and trims of one device."""

    def __init__(self, device: NbdDevice) -> None:
        announced = device.announced
        self._device = device
        self._zeroes_fast = announced.can_zero and announced.can_fast_zero
        """False after the server has refused a fast zero that it had announced."""
        self._refuses_odd_zeroes = self._refuses_odd_trims = False

    # Blocking, from any thread. `change` does a request (NbdDevice).

    def zero(
        self, change: Callable[..., None], part: Part, *, may_trim: bool, fua: bool, fast: bool
    ) -> None:
        announced = self._device.announced
        if fast and not (announced.can_zero and announced.can_fast_zero):
            raise DeviceError(f"{self._device.uri}: has no fast zero", errno.ENOTSUP)
        flags = _flags(may_trim) | (nbd.CMD_FLAG_FAST_ZERO if fast else 0)
        flags |= nbd.CMD_FLAG_FUA if fua and announced.can_fua else 0

        def send(offset: int, length: int) -> None:
            change(lambda link, *at: link.zero(*at, flags), length, offset)

        if not announced.can_zero:
            self._write(part, fua=False)
        else:
            for piece in pieces(*part, LENGTH_MAX):
                self._zero(piece, send, fua=bool(flags & nbd.CMD_FLAG_FUA))
        if fua and not (announced.can_zero and announced.can_fua):
            self._device.flush()

    def _zero(self, piece: Part, send: Callable[[int, int], None], *, fua: bool) -> None:
        if not (self._refuses_odd_zeroes and is_odd(piece)):
            try:
                send(*piece)
                return
            except DeviceError as error:
                if not is_refusal(error, piece):
                    raise
                self._refuses_odd_zeroes = True
        for part in split(piece):
            if is_odd(part):
                self._write(part, fua=fua)
            else:
                send(*part)

    def _write(self, part: Part, *, fua: bool) -> None:
        zeroes = memoryview(bytes(min(part[1], self._device.block_size.maximum, ZEROES_BYTES_MAX)))
        for start, span in pieces(*part, len(zeroes) or 1):
            self._device.pwrite(zeroes[:span], start, fua)

    def trim(self, change: Callable[..., None], part: Part, *, fua: bool) -> None:
        announced = self._device.announced
        flags = nbd.CMD_FLAG_FUA if fua and announced.can_fua else 0
        for offset, length in pieces(*part, LENGTH_MAX) if announced.can_trim else ():
            whole = [one for one in split((offset, length)) if not is_odd(one)]
            for piece in whole if self._refuses_odd_trims else [(offset, length)]:
                try:
                    change(lambda link, *at: link.trim(*at, flags), *reversed(piece))
                except DeviceError as error:
                    if not is_refusal(error, piece):
                        raise
                    self._refuses_odd_trims = True
                    self.trim(change, piece, fua=fua)
        if fua and not (announced.can_trim and announced.can_fua):
            self._device.flush()

    # On the loop's thread.

    def start(self, offset: int, length: int, may_trim: bool, done: Done) -> None:
        """Zero a range of any length. Without write-zeroes, zeroes are written."""
        device = self._device
        connection = device.pool.shared  # `step` may outlive the handle
        if length > LENGTH_MAX and connection.is_wide and self._zeroes_fast:
            self._start_wide(offset, length, may_trim, done)
            return
        can_zero, flags = device.announced.can_zero, _flags(may_trim)
        length_max = LENGTH_MAX if can_zero else min(device.block_size.maximum, ZEROES_BYTES_MAX)
        zeroes = memoryview(bytes(min(length, UNIT if can_zero else length_max)))
        parts, sent, is_zero = pieces(offset, length, length_max), (0, 0), False

        def step(error: BaseException | None) -> None:
            nonlocal sent, is_zero
            if is_zero and is_refusal(error, sent):
                self._refuses_odd_zeroes = True
                parts.append(sent)
            elif error is not None:
                done(error)
                return
            if not parts:
                done(None)
                return
            sent = parts.pop()
            if can_zero and self._refuses_odd_zeroes and is_odd(sent):
                *rest, sent = split(sent)
                parts.extend(rest)
            is_zero = can_zero and not (self._refuses_odd_zeroes and is_odd(sent))
            start, span = sent
            if is_zero:
                connection.start(connection.handle.aio_zero, span, start, flags=flags, done=step)
            else:
                write = connection.handle.aio_pwrite
                connection.start(write, zeroes[:span], start, done=step)

        step(None)

    def _start_wide(self, offset: int, length: int, may_trim: bool, done: Done) -> None:
        """Zero in one request, if the server can do that without writing zeroes. Otherwise the
        request could take as long as if the server hung; pieces show progress."""
        connection = self._device.pool.shared

        def finish(error: BaseException | None) -> None:
            is_slow = isinstance(error, DeviceError) and error.errno == errno.ENOTSUP
            if is_slow or is_refusal(error, (offset, length)):
                self._zeroes_fast = False
                self.start(offset, length, may_trim, done)
            else:
                done(error)

        flags = _flags(may_trim) | nbd.CMD_FLAG_FAST_ZERO
        connection.start(connection.handle.aio_zero, length, offset, flags=flags, done=finish)


def _flags(may_trim: bool) -> int:
    return 0 if may_trim else int(nbd.CMD_FLAG_NO_HOLE)
