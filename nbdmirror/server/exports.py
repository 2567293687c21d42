"""Exports: a server's disks by the names of NBD exports, and the clients that have them open.

A disk that is a target only (target_only.py) has two exports. Each request to the disk's own name
fails with EPERM. The export x-nbdmirror-home/SERVER/NAME is for the one server process that has the
disk. So no write of any other client is ever acknowledged. When the old side is the disk again, all
requests are carried out. Other disks are their own exports, so their requests take no longer.

For any thread.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nbdmirror.devices.base import BlockDevice, Buffer, Extent, MemoryDevice
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.target_only import TargetOnly
from nbdmirror.errors import DeviceError
from nbdmirror.foreign_text import quoted
from nbdmirror.identity import HOME, TARGET_ONLY
from nbdmirror.nbdclient.sides import LEADS_TO, NO, YES, Way, split_name
from nbdmirror.server.rings import is_on

if TYPE_CHECKING:
    from nbdmirror.server.server import Server


class OldSideExport:
    """The guest operations of Disk, on a disk that is, or was, a target only. `server`: the ID of
    the server process that has opened the home export; "" for any other client. Requests raise
    DeviceError with EPERM while they are refused."""

    def __init__(self, disk: Disk, server: str) -> None:
        self._disk = disk
        self._server = server
        self.name = disk.name if server else f"{disk.name}{TARGET_ONLY}"
        self.size = disk.size
        self.read_only = disk.read_only

    @property
    def source(self) -> BlockDevice:
        return self._disk.source

    def pread(self, buf: memoryview, offset: int) -> None:
        self._inside().pread(buf, offset)

    def pwrite(self, buf: Buffer, offset: int, fua: bool) -> None:
        self._inside().pwrite(buf, offset, fua)

    def zero(self, offset: int, length: int, *, may_trim: bool, fua: bool, fast: bool) -> None:
        self._inside().zero(offset, length, may_trim=may_trim, fua=fua, fast=fast)

    def trim(self, offset: int, length: int, *, fua: bool) -> None:
        self._inside().trim(offset, length, fua=fua)

    def flush(self) -> None:
        self._inside().flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        return self._inside().extents(offset, length)

    def cache(self, offset: int, length: int) -> None:
        self._inside().cache(offset, length)

    def _inside(self) -> Disk:
        source = self._disk.source
        if isinstance(source, TargetOnly) and not (self._server and self._server == source.writer):
            raise DeviceError(
                f"disk {self._disk.name}: refused a client's request: target only, the disk is "
                f"served from {source.truth}",
                errno.EPERM,
            )
        return self._disk


def _answer(question: str, answer: str) -> Disk:
    """The export whose description is the answer."""
    return Disk(f"{question} {answer}", MemoryDevice(0, read_only=True))


class Exports:
    """The exports of a server's disks, by name; the first disk is also the default export, ""."""

    def __init__(self, disks: Mapping[str, Disk]) -> None:
        self._disks = disks
        self.server: Server | None = None
        """Answers other servers' questions; set before the first client connects."""
        self._open: dict[Any, str] = {}
        """The disk of each client's connection."""

    def find(self, export: str) -> Disk | OldSideExport:
        """The disk of an export name. The answer to another server's question is an empty disk with
        the answer as its name. Raises DeviceError: ENOENT, or EPERM for a refused server."""
        what, server, name = split_name(export)
        if self.server is not None and what == LEADS_TO:
            return _answer(export, self._leads_to(server, name, self.server))
        disk = self._find_disk(name)
        if self.server is not None and what == HOME:
            self.server.sides.let_in(server, disk)
        elif self.server is not None and what:
            return _answer(export, self.server.sides.answer(what, server, disk))
        return OldSideExport(disk, server) if isinstance(disk.source, TargetOnly) else disk

    def _leads_to(self, server: str, words: str, here: Server) -> str:
        try:
            way, name = Way.of(server, words)
        except ValueError:
            raise DeviceError(f"{quoted(words)} is no question", errno.ENOENT) from None
        return YES if is_on(way, self._find_disk(name), here.mirrors, here.loop) else NO

    def _find_disk(self, name: str) -> Disk:
        if not name:
            return next(iter(self._disks.values()))
        if name not in self._disks:
            raise DeviceError(f"no export is called {quoted(name)}", errno.ENOENT)
        return self._disks[name]

    def opened(self, handle: Any, disk: Disk | OldSideExport) -> None:
        """A client has opened the disk, until `closed`."""
        self._open[handle] = disk.name

    def closed(self, handle: Any) -> None:
        """A client has closed its connection."""
        self._open.pop(handle, None)

    def in_use(self) -> set[str]:
        """The disks that clients have open; other servers' questions do not count."""
        return set(self._open.copy().values()) & self._disks.keys()
