"""Nodes: the targets that were added, by name: QEMU's block nodes. On the event loop's thread.

All checks raise CommandError; where QEMU has the same error, with QEMU's text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from nbdmirror.devices.base import BlockDevice, raw_device
from nbdmirror.disk.disk import Disk
from nbdmirror.errors import CommandError, ConfigError
from nbdmirror.identity import SocketFile
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.names import is_wellformed_id
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.exclusive_set import CONNECTIONS_DEFAULT
from nbdmirror.nbdclient.pair import reserve_disk, share_storage

NODES_MAX = 256
"""Most targets of all kinds. Each has a connection and three descriptors; QEMU has no such
bound."""

NAME_LENGTH_MAX = 31
_SERVED = "Failed to inactivate node: Operation not permitted"


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """The options of blockdev-add. All but the first two are only shown by queries."""

    reconnect_delay_s: float = 0.0
    read_only: bool = False
    """The node is never written to, even if the export is writable."""
    detect_zeroes: str = "off"
    direct: bool = False
    no_flush: bool = False


@dataclass(slots=True, eq=False)
class Node:
    """A target that was added: QEMU's block node."""

    name: str
    device: NbdDevice
    options: NodeOptions = NodeOptions()
    is_owned: bool = False
    """Created by drive-mirror for one job, and removed with it."""
    file: Node | None = None
    """The node below a `raw` node: both have the same device."""
    is_inline: bool = False
    """Created with the `raw` node above it, and removed with that."""
    is_active: bool = True
    """An inactive node is not written to, and cannot be a mirror's target: `Nodes.set_active`."""
    job: MirrorJob | None = None
    disk: Disk | None = None
    """The disk that is served from this node since a pivot."""

    @property
    def is_read_only(self) -> bool:
        """The node, the node below, or the export is read-only."""
        below = self.file is not None and self.file.is_read_only
        return below or self.options.read_only or self.device.read_only


@dataclass(slots=True, eq=False)
class OldFile:
    """The file that a disk was served from before its first pivot: still a node, but closed."""

    device: BlockDevice
    is_active: bool = True


class Nodes:
    """The nodes of a server. The disks' names are names of nodes too."""

    def __init__(self, disks: dict[str, Disk], connections: int = CONNECTIONS_DEFAULT) -> None:
        """`connections`: most connections to one target."""
        self._disks = disks
        self._files: dict[str, OldFile] = {}
        self._connections = connections
        self._nodes: dict[str, Node] = {}
        self._left: list[NbdDevice] = []
        """Devices of mirrors that ended, whose servers may still carry out requests."""
        for disk in disks.values():
            _tell_losses(raw_device(disk.source), disk)

    def __iter__(self) -> Iterator[Node]:
        """Oldest first."""
        return iter(list(self._nodes.values()))

    def find_target(self, disk: Disk, name: str) -> Node | None:
        """The node `name`, as the target of a mirror of `disk`; None if it is the disk's source.
        Raises CommandError."""
        if self._served_from(name) is disk:
            return None
        if name in self._nodes:
            return self._nodes[name]
        if name in self._files:
            raise CommandError(f"Node '{name}' is a file; a mirror's target is an NBD export")
        if name in self._disks:
            raise CommandError(f"Node '{name}' is in use")
        raise CommandError(f"Cannot find device='{name}' nor node-name='{name}'")

    def find_file(self, name: str) -> Node:
        """The node `name`, as the node below a `raw` node. Raises CommandError."""
        if name in self._disks:
            raise CommandError(f"Node '{name}' is a disk; a 'raw' node can be on a target alone")
        if name not in self._nodes or self._nodes[name].file is not None:
            raise CommandError(f"Cannot find device='{name}' nor node-name='{name}'")
        return self._nodes[name]

    def find_disk(self, name: str) -> Disk:
        """The disk with this name, or the disk that is served from the node `name`. Raises
        CommandError."""
        node = self._nodes.get(name)
        disk = self._disks.get(name) or (node.disk if node else None)
        if disk is None and node is not None:
            raise CommandError(f"Node '{name}' is not a disk that is served here")
        if disk is None:
            raise CommandError(f"Cannot find device='{name}' nor node-name='{name}'")
        return disk

    def mirror_to(self, name: str) -> MirrorJob | None:
        """The job whose target is the node `name`, until the pivot; None if there is none."""
        node = self._nodes.get(name)
        if node is None or node.job is None or node.disk is not None:
            return None
        return node.job if node.job.target is node.device else None  # else it is the job's journal

    def root_of(self, disk: Disk) -> Node | None:
        """The node that `disk` is served from since a pivot."""
        return next((node for node in self if node.disk is disk), None)

    def check_unused(self, device: NbdDevice) -> None:
        """Raise CommandError if a disk or a node uses the export that `device` is connected to, or
        the storage below the export."""
        sources = {disk.name: disk.source for disk in self._disks.values()}
        busy = {node.name: node.device for node in self if node.job or node.disk}
        for name, user in {**sources, **busy}.items():
            other = raw_device(user)
            if other is device or not share_storage(device, other):
                continue
            what = f"'{name}' is the same export"
            if not isinstance(other, NbdDevice):
                what = f"its server writes to '{other.description}', which is '{name}'"
            raise CommandError(f"'{device.uri}' is in use: {what}")

    def reserve(self, device: NbdDevice) -> None:
        """Keep the export for a job of this server. Raises CommandError if another nbdmirror of
        this host uses it."""
        try:
            reserve_disk(device)
        except ConfigError as error:
            raise CommandError(str(error)) from error

    def leave(self, device: NbdDevice) -> None:
        """A mirror to `device` has ended. Its requests in flight are given up; until the server has
        answered them, no other mirror to the export is allowed."""
        if device.pool.is_busy:
            device.pool.give_up()
        if device.pool.unanswered:
            self._left = [*self.left, device]

    @property
    def left(self) -> list[NbdDevice]:
        """Devices with unanswered requests of former mirrors."""
        self._left = [device for device in self._left if device.pool.unanswered]
        return self._left

    def check_left(
        self, uri: str, device: NbdDevice | None = None, *, file: SocketFile | None = None
    ) -> None:
        """Raise CommandError if the export has unanswered requests of a former mirror. Without a
        `device` only the URI and its socket, `file`, are compared, since a server that hangs greets
        no client."""
        for left in self.left:
            if device.is_same_export(left) if device else left.is_named(uri, file):
                raise CommandError(
                    f"Target '{uri}' has not answered all requests of a mirror that has ended "
                    f"({left.pool.unanswered} are left), and may carry them out over newer data: "
                    "wait until it has, or end its server"
                )

    def check_uri(self, uri: str, file: SocketFile | None, of: str) -> None:
        """Before a connection for a mirror of the disk `of`: raise CommandError if the URI, whose
        socket is `file`, names what one of the disks is served from. Its server may have room for
        one client only, and then says nothing to another one."""
        for disk in self._disks.values():
            source = raw_device(disk.source)
            if isinstance(source, NbdDevice) and source.is_named(uri, file):
                if disk is self.find_disk(of):
                    raise CommandError(f"Target '{uri}' is the disk itself")
                text = f"Target '{uri}' is in use: '{disk.name}' is the same export"
                raise CommandError(text)
        self.check_left(uri, file=file)

    def is_used(self, node: Node) -> bool:
        """Whether a job or a disk uses the node's device, under any name."""
        same = [other for other in self if other.device is node.device]
        return any(other.job is not None or other.disk is not None for other in same)

    def is_closed(self, node: Node) -> bool:
        """The node has lost its connection and is not used, so it can be opened again."""
        return node.device.is_lost and not self.is_used(node)

    def reopen(self, node: Node, device: NbdDevice) -> bool:
        """Give the node a new connection. False if another client did so first, or removed the
        node."""
        old = node.device
        if self._nodes.get(node.name) is not node or not self.is_closed(node):
            return False
        old.close()
        device.pool.limit(self._connections)
        for other in self:
            if other.device is old:
                other.device = device
        return True

    def _is_held(self, node: Node) -> bool:
        """Whether a job uses the node, or something uses the node that is removed with it."""
        goes_too = node.file is not None and node.file.is_inline
        return node.job is not None or (goes_too and self.is_used(node))

    def _above(self, node: Node) -> Node | None:
        return next((other for other in self if other.file is node), None)

    def _served_from(self, name: str) -> Disk | None:
        """The disk that is served from the node `name` now."""
        if name in self._nodes:
            return self._nodes[name].disk
        disk = self._disks.get(name)
        return disk if disk is not None and self.root_of(disk) is None else None

    def check_name(self, name: str) -> None:
        """Raise CommandError, with QEMU's text, unless a new node may have this name."""
        if not is_wellformed_id(name):
            raise CommandError(f"Invalid node-name: '{name}'")
        if len(name) > NAME_LENGTH_MAX:
            raise CommandError("Node name too long")
        self._check_free(name)

    def _check_free(self, name: str) -> None:
        if name in self._nodes or name in self._disks:
            raise CommandError(f"Duplicate nodes with node-name='{name}'")

    def check_room(self, number: int = 1) -> None:
        """Raise CommandError if there is no room for `number` more nodes."""
        if len(self._nodes) + number > NODES_MAX:
            raise CommandError(f"There are {NODES_MAX} nodes already; delete some (blockdev-del)")

    def check_replaces(self, disk: Disk, name: str) -> None:
        """Raise CommandError, with QEMU's text, unless a pivot of `disk` replaces the node
        `name`."""
        if name not in self._nodes and name not in self._disks:
            raise CommandError(f"Failed to find node with node-name='{name}'")
        if name != disk.name and self._served_from(name) is not disk:
            raise CommandError(
                f"Cannot replace '{name}' by a node mirrored from '{disk.name}', because it cannot "
                "be guaranteed that doing so would not lead to an abrupt change of visible data"
            )

    def add(self, node: Node) -> None:
        """Add the node, and an inline node below it. Its name was checked; a node without a name
        gets a generated one in QEMU's form, which no user can choose. Raises CommandError."""
        node.name = node.name or self._generated_name()
        added = [node]
        if node.file is not None and node.file.is_inline:
            node.file.name = node.file.name or self._generated_name()
            added.insert(0, node.file)
            if node.file.name == node.name:
                raise CommandError(f"Duplicate nodes with node-name='{node.name}'")
        self.check_room(len(added))
        for one in added:
            self._check_free(one.name)
        if node.file is not None and node.is_active and not node.file.is_active:
            raise CommandError(
                f"Inactive '{node.file.name}' can't be a file child of active '{node.name}'"
            )
        self._nodes |= {one.name: one for one in added}
        node.device.pool.limit(self._connections)

    def _generated_name(self) -> str:
        numbers = (f"#block{number:03}" for number in itertools.count())
        return next(name for name in numbers if name not in self._nodes)

    def add_again(self, node: Node) -> None:
        """Add the node of an earlier process. If a disk has its name now, the node gets a generated
        one (a pivoted disk that was being mirrored back to its first source)."""
        if node.name in self._nodes or node.name in self._disks:
            node.name = ""
        self.add(node)

    def pivoted(self, disk: Disk, node: Node, old: BlockDevice) -> None:
        """`disk` is served from `node` now. `old`, its former source, remains a closed node until
        blockdev-del, as in QEMU."""
        if (root := self.root_of(disk)) is not None:
            root.disk = None
        elif isinstance(old, NbdDevice):
            self._nodes = {disk.name: Node(disk.name, old), **self._nodes}  # the oldest
        else:
            self._files[disk.name] = OldFile(old)
        node.disk = disk
        _tell_losses(node.device, disk)

    def file_of(self, disk: Disk) -> OldFile | None:
        """The file that `disk` was served from before its first pivot, if it is still a node."""
        return self._files.get(disk.name)

    def set_active(self, name: str | None, active: bool) -> None:
        """blockdev-set-active: for the node `name` and the node below it, or for all (None). Raises
        CommandError, with QEMU's text, for a node that must stay active."""
        if name is None and not active and self._disks:
            raise CommandError("Failed to inactivate all nodes: Operation not permitted")
        if name is None:
            changed: list[Node | OldFile] = [*self, *self._files.values()]
        else:
            changed = self._with_file(name)
            reason = self._needed_by(changed[0]) if changed else _SERVED
            if reason and not active:
                raise CommandError(reason)
        for node in changed:
            if active or not self._needed_by(node):
                node.is_active = active

    def _with_file(self, name: str) -> list[Node | OldFile]:
        """The node `name` and the node below it; [] for a disk's own node, which is always
        active."""
        node = self._nodes.get(name)
        if node is not None:
            return [node] if node.file is None else [node, node.file]
        if self._served_from(name) is None and name not in self._files:
            raise CommandError(f"Failed to find node with node-name='{name}'")
        return [self._files[name]] if name in self._files else []

    def _needed_by(self, node: Node | OldFile) -> str:
        """The error if `node` must stay active; "" if it need not."""
        if any(other.file is node and other.is_active for other in self):
            return "Node has active parent node"
        if isinstance(node, Node) and node.disk is not None:
            return _SERVED
        if isinstance(node, Node) and node.job is not None:
            return f"Node {node.name} is in use"
        return ""

    def remove(self, name: str) -> None:
        """Remove a node and close it. Raises CommandError, with QEMU's text, if it is in use."""
        node, disk = self._nodes.get(name), self._served_from(name)
        if disk is not None and any(n.job is not None and n.job.disk is disk for n in self):
            raise CommandError(
                f"Node '{name}' is busy: block device is in use by block job: mirror"
            )
        if disk is not None or (node is not None and self._is_held(node)):
            raise CommandError(f"Node {name} is in use")
        if node is not None and self._above(node) is not None:
            if node.is_inline:
                raise CommandError(f"Node {name} is not owned by the monitor")
            raise CommandError(f"Block device {name} is in use")
        if node is not None:
            self._nodes.pop(name)
            if node.file is not None and node.file.is_inline:
                self._nodes.pop(node.file.name)
            if all(other.device is not node.device for other in self):
                node.device.close()
        elif self._files.pop(name, None) is None:
            raise CommandError(f"Failed to find node with node-name='{name}'")

    def forget(self, node: Node) -> None:
        """Remove a node that was created for one job. Has no effect on one that was not added."""
        if self._nodes.get(node.name) is node:
            del self._nodes[node.name]


def _tell_losses(device: BlockDevice, disk: Disk) -> None:
    """`disk` is served from `device`: its bitmaps must know of writes that the device loses. (A
    mirror takes the call over while it runs.)"""
    if isinstance(device, NbdDevice):
        device.on_lost_writes = disk.lose_writes
