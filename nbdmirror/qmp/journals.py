"""The journal of a mirror with points, as commands name it: a node, or an NBD URI."""

from __future__ import annotations

from nbdmirror.errors import CommandError
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.qmp.addresses import target_uri
from nbdmirror.qmp.opening import check_uri, open_device
from nbdmirror.server.nodes import Node
from nbdmirror.server.server import Server


async def open_journal(server: Server, text: str, disk: str, timeout_s: float) -> NbdDevice:
    """Connect to the journal at the URI `text`, for the disk of this name, within `timeout_s`.
    Raises CommandError."""
    try:
        uri = target_uri(text)
        await check_uri(server, uri, disk)
        return await open_device(lambda: uri, timeout_s)
    except CommandError as error:
        raise CommandError(f"Journal: {error}") from error


def journal_node(server: Server, name: str, disk: str) -> Node:
    """The node of this name, if it is one that may be looked into. Raises CommandError. On the
    event loop's thread."""
    node = server.nodes.find_target(server.nodes.find_disk(disk), name)
    if node is None or server.nodes.is_used(node):
        raise CommandError(f"Journal: Node '{name}' is in use")
    if node.device.is_lost:
        raise CommandError(f"Journal: Node '{node.name}' has lost its connection")
    return node
