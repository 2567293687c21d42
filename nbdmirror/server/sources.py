"""Sources: what mirrors read disks through; closed once a disk is served from somewhere else.

On the event loop's thread.
"""

from __future__ import annotations

from nbdmirror.devices.async_file import FileSource
from nbdmirror.devices.base import BlockDevice, raw_device
from nbdmirror.disk.disk import Disk
from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.server.nodes import Nodes

RETIRE_POLL_S = 0.005
"""How often a replaced source is looked at for reads that are still on it."""


class Sources:
    def __init__(self, nodes: Nodes, loop: Loop) -> None:
        self._nodes = nodes
        self._loop = loop
        self._files: dict[BlockDevice, FileSource] = {}
        """Kept for later mirrors: a disk that hangs has so many threads and no more."""

    def of(self, disk: Disk) -> FileSource | NbdDevice:
        device = raw_device(disk.source)
        if isinstance(device, NbdDevice):
            return device
        new = FileSource(disk.source, self._loop.call_soon)
        return self._files.setdefault(disk.source, new)

    def retire(self, device: BlockDevice, disk: Disk) -> None:
        """Close `device`, which `disk` is not served from any more, once the reads that were on it
        have gone."""
        reads = disk.ledger.reads()

        def look() -> None:
            nonlocal reads
            reads = disk.ledger.reads_left(reads)
            if reads:
                self._loop.call_later(RETIRE_POLL_S, look)
            else:
                self._files.pop(device, device).close()
                raw = raw_device(device)
                # As in QEMU a node that the user added stays until blockdev-del, closed as it is.
                for node in self._nodes:
                    if node.device is raw and node.is_owned:
                        self._nodes.forget(node)

        look()
