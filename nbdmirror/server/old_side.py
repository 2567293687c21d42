"""OldSides: a server's answers about its disks' sides, and how an old side becomes the disk.

An old side becomes the disk when the server that had the disk reports the move, after that server
has recorded it. Before that only that server can read or write here (exports.py), and no client can
read old bytes (target_only.py). docs/state.md has the argument.

For any thread but the loop's.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping

from nbdmirror.disk.disk import Disk
from nbdmirror.disk.target_only import TargetOnly
from nbdmirror.errors import IO_ERRORS, DeviceError
from nbdmirror.nbdclient.sides import MOVED_HERE, Side, look
from nbdmirror.state.pivots import forget
from nbdmirror.state.recovery import RecoveredState
from nbdmirror.state.store import DiskStore
from nbdmirror.state.writer import Writer
from nbdmirror.subject_log import disk_log


class OldSides:
    """The old sides among a server's disks."""

    def __init__(
        self,
        stores: Mapping[str, DiskStore],
        writers: Mapping[str, Writer],
        take_up: Callable[[Disk, RecoveredState], None],
    ) -> None:
        """`take_up` restores the disk's bitmaps."""
        self._stores = stores
        self._writers = writers
        self._take_up = take_up
        self._letting_in, self._retiring = threading.Lock(), threading.Lock()

    def let_in(self, server: str, disk: Disk) -> None:
        """`server`, the ID of a process, wants to write to `disk`. A target only accepts it if the
        process at the disk's URI has that ID and has the disk. Then requests of a process that was
        accepted before are refused. Raises DeviceError with EPERM. Blocks for one question."""
        with self._letting_in:
            source = disk.source
            if not isinstance(source, TargetOnly) or (server and source.writer == server):
                return
            if look(source.truth) != (Side.DISK, server):
                raise DeviceError(
                    f"disk {disk.name}: refused a mirror from another server than the disk's: "
                    f"target only, the disk is served from {source.truth}",
                    errno.EPERM,
                )
            source.writer = server

    def answer(self, question: str, server: str, disk: Disk) -> Side:
        """The answer to a question (sides.py) of `server`, the ID of a process, about `disk`."""
        if question == MOVED_HERE:
            with self._retiring:
                self._retire(disk, server)
        source = disk.source
        if isinstance(source, TargetOnly):
            return Side.WHOLE if source.is_whole else Side.TARGET
        return Side.MOVED if disk.has_moved else Side.DISK

    def _retire(self, disk: Disk, server: str) -> None:
        """Make the old side the disk, if `server` has written all of it."""
        device, name, log = disk.source, disk.name, disk_log(disk.name)
        if not isinstance(device, TargetOnly):
            return
        if not server or server != device.writer:
            log.warning("stays a target only: the server that asks has not mirrored here")
            return
        if not device.is_whole:
            log.warning("stays a target only: not all of it was written")
            return
        found: list[RecoveredState] = []

        def write() -> None:
            device.flush()
            store = self._stores[name]
            definition = forget(store.folder, name, store.identity)
            if definition is not None:
                found.append(
                    RecoveredState(definition, problem="its bitmaps come from the other side")
                )

        try:
            self._writers[name].submit(write).result()
        except IO_ERRORS as error:
            log.error("stays a target only: %s", error)
            return
        disk.unwrap(device.inner)
        log.info("moved here from %s, and is the disk from now on", device.truth)
        for one in found:
            self._take_up(disk, one)
