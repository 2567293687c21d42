"""QMP's commands for nodes, which are the targets of mirrors: blockdev-..."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nbdmirror.errors import CommandError
from nbdmirror.events import Reply
from nbdmirror.qmp.addresses import nbd_uri
from nbdmirror.qmp.arguments import NODE
from nbdmirror.qmp.command import Arguments, CommandTable, ask_loop, by_name, on_loop
from nbdmirror.qmp.opening import open_device, open_timeout_s
from nbdmirror.qmp.schema import BOOL, STR, optional, struct
from nbdmirror.server.nodes import Node, NodeOptions
from nbdmirror.server.server import Server

COMMANDS = CommandTable()

_INHERITED = ("read_only", "auto_read_only", "discard", "detect_zeroes", "cache")
"""Options that a node passes on to the node that is created with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeArguments:
    """QEMU's BlockdevOptions, with the defaults. None: not given."""

    driver: str
    node_name: str | None = None
    active: bool = True
    discard: str = "ignore"
    cache: Arguments = field(default_factory=dict)
    read_only: bool = False
    auto_read_only: bool = False
    force_share: bool = False
    detect_zeroes: str = "off"
    file: str | Arguments | None = None
    """Of `raw`. The following are of `nbd`."""
    server: Arguments | None = None
    export: str = ""
    tls_creds: str | None = None
    x_nbdmirror_tls_username: str | None = None
    open_timeout: int = 0
    reconnect_delay: int = 0

    def options(self) -> NodeOptions:
        if self.detect_zeroes == "unmap" and self.discard != "unmap":
            raise CommandError(
                "setting detect-zeroes to unmap is not allowed without setting discard operation "
                "to unmap"
            )
        return NodeOptions(
            reconnect_delay_s=self.reconnect_delay,
            read_only=self.read_only,
            detect_zeroes=self.detect_zeroes,
            direct=self.cache.get("direct", False),
            no_flush=self.cache.get("no-flush", False),
        )

    def uri(self) -> str:
        assert self.server is not None
        return nbd_uri(self.server, self.export, self.tls_creds, self.x_nbdmirror_tls_username)


@COMMANDS.command("blockdev-add", NODE)
async def blockdev_add(server: Server, /, **arguments: Any) -> Reply:
    new, nodes = NodeArguments(**arguments), server.nodes
    if new.node_name is None:
        raise CommandError("'node-name' must be specified for the root node")
    name = new.node_name
    await ask_loop(server, partial(nodes.check_name, name))
    await ask_loop(server, nodes.check_room)
    options = new.options()
    if isinstance(new.file, str):
        return await on_loop(server, partial(_add_raw, server, new.file, name, options, new.active))
    if new.file is None:
        node = await _connect(name, new)
    else:
        inherited = {key: arguments[key] for key in _INHERITED if key in arguments}
        file = NodeArguments(**{**inherited, **by_name(new.file)})
        if file.node_name is not None:
            await ask_loop(server, partial(nodes.check_name, file.node_name))
        below = await _connect(file.node_name or "", file)
        below.is_inline = True
        node = Node(name, below.device, options, file=below, is_active=new.active)
    try:
        return await on_loop(server, partial(nodes.add, node))
    except CommandError:
        node.device.close()
        raise


async def _connect(name: str, new: NodeArguments) -> Node:
    """Connect, and return a new node of the driver `nbd`. Raises CommandError."""
    options = new.options()
    device = await open_device(new.uri, open_timeout_s("open-timeout", new.open_timeout))
    if device.read_only and not (new.read_only or new.auto_read_only):
        device.close()
        raise CommandError("Could not open image: Permission denied")
    return Node(name, device, options, is_active=new.active)


def _add_raw(server: Server, file: str, name: str, options: NodeOptions, is_active: bool) -> None:
    """Add a second name for an existing node."""
    below = server.nodes.find_file(file)
    server.nodes.add(Node(name, below.device, options, file=below, is_active=is_active))


@COMMANDS.command("blockdev-del", struct("BlockdevDel", node_name=STR))
def blockdev_del(server: Server, node_name: str) -> None:
    server.nodes.remove(node_name)


_SET_ACTIVE = struct("BlockdevSetActive", node_name=optional(STR), active=BOOL)


@COMMANDS.command("blockdev-set-active", _SET_ACTIVE)
def blockdev_set_active(server: Server, active: bool, node_name: str | None = None) -> None:
    server.nodes.set_active(node_name, active)
