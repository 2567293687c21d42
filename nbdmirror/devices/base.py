"""What a disk is made of: the BlockDevice protocol, extents, and the reference device in memory.

Vocabulary, used everywhere in this project: `offset` and `length` are bytes; a range is
[offset, offset + length); an extent is a range of one kind, as NBD's base:allocation tells it.

Every device passes tests/unit/devices/test_device_contract.py. `MemoryDevice` is the reference: in
case of doubt the other devices do the same.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from nbdmirror.errors import DeviceError

Buffer = bytes | bytearray | memoryview

REQUEST_BYTES_MAX = 64 << 20
"""Largest read or write that nbdkit takes from a guest."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes of one kind. `zero`: reads as zeroes. `hole`: not allocated.

    The bits are NBD's NBD_STATE_ZERO and NBD_STATE_HOLE; a hole that does not read as zero is
    legal.
    """

    length: int
    zero: bool
    hole: bool


@dataclass(frozen=True, slots=True)
class BlockSize:
    """NBD's block size constraints in bytes; every offset and length is a multiple of `minimum`."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = REQUEST_BYTES_MAX


ReadPart = Callable[[tuple[memoryview], int], int]
WritePart = Callable[[Buffer, int], int]


def _read_nothing(bufs: tuple[memoryview], offset: int) -> int:
    return 0


def _write_nothing(buf: Buffer, offset: int) -> int:
    return 0


class BlockDevice(Protocol):
    """A disk with blocking calls, safe to call from any number of threads at once.

    Calls raise OSError or DeviceError (`errors.IO_ERRORS`); after an error the content of the range
    of a changing call is undefined. Offsets and lengths lie within `size`; the caller has checked
    that. The result of two calls on overlapping ranges at once is undefined, as on any disk.

    A device has all abilities named here, and emulates those that its medium lacks: it writes
    zeroes, flushes for FUA, ignores a trim that is not possible. So the abilities that a guest saw
    when it connected hold on every device that the disk moves to later. Only `fast` zeroing may be
    refused, with ENOTSUP, as the NBD protocol allows.
    """

    description: str
    """For messages: the path or the URI."""
    size: int
    """Bytes."""
    read_only: bool
    block_size: BlockSize
    read_part: ReadPart = staticmethod(_read_nothing)
    """`pread` of the first part of `(buf,)`, in one call of C. Returns the bytes that were read; 0
    on a device that cannot do this. Disk tries this first: see docs/measurements/2026-11-24.md."""
    write_part: WritePart = staticmethod(_write_nothing)
    """`pwrite` of the first part of `buf`, in the same way."""

    def pread(self, buf: memoryview, offset: int) -> None:
        """Fill all of `buf` from `offset`. Raises IO_ERRORS, as all calls."""

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        """Write all of `buf` at `offset`; durable on return if `fua`. `buf` is not kept."""

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_trim: bool = False,
        fua: bool = False,
        fast: bool = False,
    ) -> None:
        """Make the range read as zeroes; unless `may_trim`, it stays allocated.

        `fast`: fail with ENOTSUP, having changed nothing, rather than be as slow as a write.
        """

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """A hint: the content of the range is not needed any more."""

    def flush(self) -> None:
        """Every write that returned before this call is durable when it returns."""

    def sync(self) -> None:
        """As `flush`, but without using up an error that the next guest flush must report."""
        self.flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        """The extents of the range, in order; at least one. Their sum may be less than `length`
        (query again from there), never more."""

    def cache(self, offset: int, length: int) -> None:
        """A hint: the range will be read soon."""

    def close(self) -> None:
        """Release everything. Idempotent. No other call may be in progress or follow."""


Done = Callable[[BaseException | None], None]
"""Called once when a request has ended, with None or the error."""

ExtentsDone = Callable[[list[Extent] | None, BaseException | None], None]
"""Called once, with the extents or with the error."""


@runtime_checkable
class Passing(Protocol):
    """A disk that may go away for good, as a point of a journal does. `gone`: why it has; empty if
    it has not, as far as is known."""

    gone: str


class AsyncSource(Protocol):
    """A disk as the copier reads it: a call starts a request, and `done` reports its end.

    Only for the event loop's thread; `done` is called on it, possibly before the call returns.
    Buffers stay alive and unchanged until then. Errors come through `done`, never as exceptions.
    """

    size: int

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None: ...

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None: ...


class AsyncTarget(Protocol):
    """A disk as the copier writes it; the rules of AsyncSource."""

    size: int

    def start_write(self, buf: memoryview, offset: int, done: Done) -> None: ...

    def start_zero(self, offset: int, length: int, may_trim: bool, done: Done) -> None: ...

    def start_flush(self, done: Done) -> None: ...


def all_of(count: int, done: Done) -> Done:
    """For the ends of `count` requests, of which there is at least one: `done` is called after the
    last of them, with the first error."""
    first_error: BaseException | None = None

    def ended(error: BaseException | None) -> None:
        nonlocal count, first_error
        count, first_error = count - 1, first_error or error
        if not count:
            done(first_error)

    return ended


def merge_extents(extents: list[Extent]) -> list[Extent]:
    """`extents`, with neighbours of one kind joined and without empty ones."""
    merged: list[Extent] = []
    for extent in extents:
        if not extent.length:
            continue
        if merged and (merged[-1].zero, merged[-1].hole) == (extent.zero, extent.hole):
            extent = Extent(merged.pop().length + extent.length, extent.zero, extent.hole)
        merged.append(extent)
    return merged


def leading_bytes(extents: list[Extent], *, zero: bool) -> int:
    """Length in bytes of the leading extents whose `zero` is the given one."""
    length = 0
    for extent in extents:
        if extent.zero != zero:
            break
        length += extent.length
    return length


def round_out(offset: int, length: int, unit: int) -> tuple[int, int]:
    """The smallest range of whole units that covers the range; it may pass a disk's odd end."""
    start = offset // unit * unit
    end = -(-(offset + length) // unit) * unit
    return start, end - start


class Wrapper(BlockDevice):
    """A device around another one."""

    inner: BlockDevice


def raw_device(device: BlockDevice) -> BlockDevice:
    """The device below all wrappers."""
    while isinstance(device, Wrapper):
        device = device.inner
    return device


class MemoryDevice(BlockDevice):
    """A disk in memory, with holes: the reference for every other device.

    `allocated` has one byte for each block of 4096 bytes, so that trim, zero and extents can be
    observed.
    """

    BLOCK_BYTES = 4096

    def __init__(self, size: int, *, read_only: bool = False, description: str = "memory") -> None:
        self.description = description
        self.size = size
        self.read_only = read_only
        self.block_size = BlockSize()
        self.data = bytearray(size)
        self.allocated = bytearray(-(-size // self.BLOCK_BYTES))

    def pread(self, buf: memoryview, offset: int) -> None:
        self._check(offset, len(buf))
        buf[:] = memoryview(self.data)[offset : offset + len(buf)]

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        self._check(offset, len(buf), change=True)
        self.data[offset : offset + len(buf)] = buf
        self._allocate(offset, len(buf))

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_trim: bool = False,
        fua: bool = False,
        fast: bool = False,
    ) -> None:
        self._check(offset, length, change=True)
        self.data[offset : offset + length] = bytes(length)
        if may_trim:
            self._deallocate(offset, length)
        else:
            self._allocate(offset, length)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self.zero(offset, length, may_trim=True)

    def flush(self) -> None:
        pass

    def extents(self, offset: int, length: int) -> list[Extent]:
        self._check(offset, length)
        found: list[Extent] = []
        end = offset + length
        while offset < end:
            block = offset // self.BLOCK_BYTES
            is_hole = not self.allocated[block]
            other = self.allocated.find(is_hole, block)
            until = min(end, other * self.BLOCK_BYTES) if other >= 0 else end
            found.append(Extent(until - offset, zero=is_hole, hole=is_hole))
            offset = until
        return found

    def cache(self, offset: int, length: int) -> None:
        self._check(offset, length)

    def close(self) -> None:
        pass

    def _check(self, offset: int, length: int, *, change: bool = False) -> None:
        if change and self.read_only:
            raise DeviceError(f"{self.description}: is read-only", errno.EROFS)
        if offset < 0 or length < 0 or offset + length > self.size:
            raise DeviceError(
                f"{self.description}: {length} bytes at {offset} lie outside its {self.size} bytes",
                errno.EINVAL,
            )

    def _allocate(self, offset: int, length: int) -> None:
        start, span = round_out(offset, length, self.BLOCK_BYTES)
        first, count = start // self.BLOCK_BYTES, span // self.BLOCK_BYTES
        self.allocated[first : first + count] = b"\1" * count

    def _deallocate(self, offset: int, length: int) -> None:
        """Make holes of blocks that the range covers whole. The short last block counts as whole
        if the range reaches the disk's end."""
        end = offset + length
        first = -(-offset // self.BLOCK_BYTES)
        last = len(self.allocated) if end == self.size else end // self.BLOCK_BYTES
        if last > first:
            self.allocated[first:last] = bytes(last - first)


Run = tuple[int, int, memoryview | None]
"""Offset and length in bytes, and the data to write there; None for zeroes."""


def pieces(offset: int, length: int, length_max: int) -> list[tuple[int, int]]:
    """The range, cut into pieces of at most `length_max` bytes."""
    end = offset + length
    return [(start, min(length_max, end - start)) for start in range(offset, end, length_max)]
