"""Sources: the devices through which mirrors read disks; closed after a pivot.

On the event loop's thread.
"""

from __future__ import annotations

from nbdmirror.devices.async_file import FileSource
from nbdmirror.devices.base import BlockDevice, raw_device
from nbdmirror.disk.disk import Disk
from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.reservations import release
from nbdmirror.server.nodes import Nodes

RETIRE_POLL_S = 0.005
"""Interval at which a replaced source is checked for reads in progress."""


class Sources:
    """One source for each device; an NBD device is its own source."""

    def __init__(self, nodes: Nodes, loop: Loop) -> None:
        self._nodes = nodes
        self._loop = loop
        self._files: dict[BlockDevice, FileSource] = {}
        """Kept for later mirrors, so that the threads of a disk that hangs do not become more."""

    def of(self, disk: Disk) -> FileSource | NbdDevice:
        """The source for mirrors of `disk`."""
        device = raw_device(disk.source)
        if isinstance(device, NbdDevice):
            return device
        new = FileSource(disk.source, self._loop.call_soon)
        return self._files.setdefault(disk.source, new)

    def retire(self, device: BlockDevice, disk: Disk) -> None:
        """Close `device`, the old source of `disk`, after its reads in progress have ended. Not in
        this step: guests' first requests after a pivot would wait for the thread that closes it."""
        reads = disk.ledger.reads()

        def look() -> None:
            nonlocal reads
            reads = disk.ledger.reads_left(reads)
            if reads:
                self._loop.call_later(RETIRE_POLL_S, look)
            else:
                self._files.pop(device, device).close()
                raw = raw_device(device)
                release(raw)
                # As in QEMU a node that the user added stays, closed, until blockdev-del.
                for node in self._nodes:
                    if node.device is raw and node.is_owned:
                        self._nodes.forget(node)

        self._loop.call_soon(look)
