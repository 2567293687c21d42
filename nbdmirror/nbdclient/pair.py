"""Two disks that must be two: an image and its journal, the disks of a server, a disk and a target.
Each is a raw file, a block device or an NBD export."""

from __future__ import annotations

import os

from nbdmirror import layers
from nbdmirror.devices.base import BlockDevice
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import ConfigError
from nbdmirror.identity import Same, is_same_file, same_place
from nbdmirror.layers import layers_of
from nbdmirror.nbd_uri import is_uri
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.reservations import places_of_file, places_of_peer, reserve
from nbdmirror.nbdclient.shared_connection import SharedConnection
from nbdmirror.nbdclient.sides import Way, leads_to


def are_same(one: str, other: str) -> bool:
    """Whether both names are surely the same disk; nothing is opened."""
    if is_uri(one) != is_uri(other):
        return False
    if is_uri(one):
        return same_place(one, other) is Same.YES
    try:
        return is_same_file(os.stat(one), os.stat(other))
    except OSError:
        return False  # opening it says more


def share_storage(one: BlockDevice, other: BlockDevice) -> bool:
    """Whether what is written to one of them changes the other, as far as that can be seen."""
    if isinstance(one, NbdDevice) and isinstance(other, NbdDevice):
        return one.is_same_export(other)
    if isinstance(one, FileDevice) and isinstance(other, FileDevice):
        return bool(layers.share_storage(layers_of(one.opened), layers_of(other.opened)))
    for export, file in ((one, other), (other, one)):
        if isinstance(export, NbdDevice) and isinstance(file, FileDevice):
            return export.is_of_file(file.opened)
    return False


def reserve_disk(
    disk: BlockDevice, path: str = "", connection: SharedConnection | None = None
) -> None:
    """Keep what is written to `disk` from other nbdmirrors of this host, until `release` or the
    disk's end. `path`: what users call a file. `connection`: the one to an export that is about to
    be used. Raises ConfigError if another nbdmirror uses it."""
    if isinstance(disk, NbdDevice):
        peer = (connection or disk.pool.shared).peer
        if peer is not None:
            reserve(disk, places_of_peer(peer), f"'{disk.uri}'")
    elif isinstance(disk, FileDevice):
        reserve(disk, places_of_file(disk.opened), path)


def check_pair(image: BlockDevice, journal: BlockDevice) -> None:
    """Raise ConfigError if both share storage."""
    if share_storage(image, journal):
        raise ConfigError(f"{journal.description}: is the same disk as {image.description}")


def is_disk_of(journal: bytes, image: BlockDevice) -> bool:
    """Whether `image` is the disk whose points a journal has, or is passed on to that, as far as
    nbdmirrors say. `journal`: the disk's ID in the journal. Blocks for the questions."""
    return isinstance(image, NbdDevice) and leads_to(image, Way.to_disk_of(journal))


def why_unfit(export: NbdDevice, block_bytes: int) -> str:
    """Why an export cannot be the image or the journal of points, in blocks of `block_bytes`, that
    are written; empty if it can."""
    if export.read_only:
        return "the export is read-only"
    if not export.announced.can_flush:
        return "the server cannot flush, so nothing that it holds is safe"
    if (least := export.block_size.minimum) > block_bytes:
        return f"the export has blocks of {least} bytes, and a journal has blocks of {block_bytes}"
    return ""
