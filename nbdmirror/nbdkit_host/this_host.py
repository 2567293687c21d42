"""What a server has to do with the other servers of its host, when it starts."""

from __future__ import annotations

import logging

from nbdmirror.devices.base import BlockDevice
from nbdmirror.errors import ConfigError
from nbdmirror.local_servers import has_proc
from nbdmirror.logs import print_startup_error
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.pair import reserve_disk

_NO_PROC = (
    "warning: /proc is not mounted: not known is whether another server of this host has the same "
    "storage under another name or address, and whether the host was started since the last start"
)


def warn_without_proc() -> None:
    """Everything else works without /proc."""
    if not has_proc():
        print_startup_error(_NO_PROC, logging.WARNING)


def reserve(device: BlockDevice, path: str) -> None:
    """A file is refused if another nbdmirror uses the same. An export may have two servers while a
    guest moves from one to the other."""
    try:
        reserve_disk(device, f"file={path}:")
    except ConfigError as error:
        if not isinstance(device, NbdDevice):
            raise
        print_startup_error(f"warning: {error}: guests of one server alone may write")
