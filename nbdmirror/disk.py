"""Disk: what the guest sees. Every guest operation goes through here, and through the ledger.

The source is one attribute. A request looks at it after it has announced itself to the ledger, so
replacing it behind a closed gate (`swap`) means that no request is lost, none is served twice, and
the guest's connections never know.

Calls are for any thread, except `swap`, which is for the owner of the disk's jobs.
"""

from __future__ import annotations

from nbdmirror.device import BlockDevice, Buffer, Extent
from nbdmirror.ledger import Ledger


class Disk:
    """A named disk of a fixed size. The guest operations have the meaning of BlockDevice's."""

    def __init__(self, name: str, source: BlockDevice) -> None:
        self.name = name
        self.size = source.size
        self.read_only = source.read_only
        self.ledger = Ledger()
        self._source = source

    @property
    def source(self) -> BlockDevice:
        """The device that guests are served from now."""
        return self._source

    def swap(self, target: BlockDevice) -> BlockDevice:
        """Serve guests from `target` from now on; returns the device served until now.

        The gate is closed and no changing request is under way. Reads may still be on the old
        device: see Ledger.readers before it is closed.
        """
        assert self.ledger.is_idle, "swap behind a closed gate only"
        assert target.size >= self.size, "the job has compared the sizes"
        old, self._source = self._source, target
        return old

    def pread(self, buf: memoryview, offset: int) -> None:
        ledger = self.ledger
        token = ledger.enter_read()
        try:
            self._source.pread(buf, offset)
        finally:
            ledger.leave_read(token)

    def pwrite(self, buf: Buffer, offset: int, fua: bool) -> None:
        ledger = self.ledger
        token = ledger.enter()
        try:
            self._source.pwrite(buf, offset, fua)
        finally:
            ledger.leave(token, offset, len(buf))

    def zero(self, offset: int, length: int, *, may_trim: bool, fua: bool, fast: bool) -> None:
        ledger = self.ledger
        token = ledger.enter()
        try:
            self._source.zero(offset, length, may_trim=may_trim, fua=fua, fast=fast)
        finally:
            ledger.leave(token, offset, length)

    def trim(self, offset: int, length: int, *, fua: bool) -> None:
        ledger = self.ledger
        token = ledger.enter()
        try:
            self._source.trim(offset, length, fua=fua)
        finally:
            ledger.leave(token, offset, length)

    def flush(self) -> None:
        ledger = self.ledger
        token = ledger.enter()
        try:
            self._source.flush()
        finally:
            ledger.leave(token, 0, 0)

    def extents(self, offset: int, length: int) -> list[Extent]:
        ledger = self.ledger
        token = ledger.enter_read()
        try:
            return self._source.extents(offset, length)
        finally:
            ledger.leave_read(token)

    def cache(self, offset: int, length: int) -> None:
        ledger = self.ledger
        token = ledger.enter_read()
        try:
            self._source.cache(offset, length)
        finally:
            ledger.leave_read(token)
