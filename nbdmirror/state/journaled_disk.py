"""A disk whose changes in progress are noted in memory that outlives the process."""

from __future__ import annotations

from nbdmirror.devices.base import BlockDevice, Buffer
from nbdmirror.disk.disk import Disk
from nbdmirror.state.journal import Journal


class JournaledDisk(Disk):
    """A disk that notes each change in the journal before it begins, so that a crash misses none
    (rule 47). `journal` is set before guests connect."""

    def __init__(self, name: str, source: BlockDevice, journal: Journal, size: int) -> None:
        super().__init__(name, source, size)
        self.journal = journal

    def pwrite(self, buf: Buffer, offset: int, fua: bool) -> None:
        journal = self.journal
        slot = journal.begin(offset, len(buf))
        try:
            super().pwrite(buf, offset, fua)
        finally:
            journal.end(slot)

    def zero(self, offset: int, length: int, *, may_trim: bool, fua: bool, fast: bool) -> None:
        slot = self.journal.begin(offset, length)
        try:
            super().zero(offset, length, may_trim=may_trim, fua=fua, fast=fast)
        finally:
            self.journal.end(slot)

    def trim(self, offset: int, length: int, *, fua: bool) -> None:
        slot = self.journal.begin(offset, length)
        try:
            super().trim(offset, length, fua=fua)
        finally:
            self.journal.end(slot)
