"""The conditions on a disk and a target for a mirror to begin, and the mirror's granularity."""

from __future__ import annotations

from nbdmirror.devices.base import raw_device
from nbdmirror.devices.file import FileDevice
from nbdmirror.disk.bitmap import GRANULARITY_DEFAULT, GRANULARITY_MAX
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.fine import UNIT_MIN
from nbdmirror.disk.target_only import TargetOnly
from nbdmirror.errors import CommandError
from nbdmirror.mirror.options import MirrorOptions
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.sides import is_old_side, not_whole
from nbdmirror.points.served import ServedPoint
from nbdmirror.server.bitmaps import NamedBitmap
from nbdmirror.server.nodes import Node


def check_target(disk: Disk, node: Node, options: MirrorOptions) -> None:
    """Raise CommandError if `disk` cannot be mirrored to `node`, independent of other jobs."""
    check_is_disk(disk)
    if isinstance(disk.source, ServedPoint):
        text = "becomes a point of its journal; try again when it has all of it"
        raise CommandError(f"Node '{disk.name}' is busy: '{disk.source.description}' {text}")
    target = node.device
    if target.is_lost:
        raise CommandError(f"Node '{node.name}' has lost its connection to '{target.uri}'")
    if target.is_own_export():
        raise CommandError(f"Target '{target.uri}' is an export of this server itself")
    source = raw_device(disk.source)
    if isinstance(source, NbdDevice) and source.is_same_export(target):
        raise CommandError(f"Target '{target.uri}' is the disk itself")
    if not node.is_active:
        raise CommandError("Permission 'write' unavailable on inactive node")
    if isinstance(source, FileDevice) and target.is_of_file(source.opened):
        raise CommandError(
            f"The server of target '{target.uri}' writes to '{source.description}' itself"
        )
    if node.is_read_only:
        raise CommandError("Block node is read-only")
    if is_old_side(target) and not options.writes_all:
        raise CommandError(not_whole(target))
    if not target.announced.can_flush and disk.size:
        raise CommandError(
            f"Target '{target.uri}' does not support flush, so its data would not be durable"
        )
    if disk.size % target.block_size.minimum:
        raise CommandError(
            f"The disk's size {disk.size} is not a multiple of the minimum block size "
            f"{target.block_size.minimum} of '{target.uri}'"
        )
    least = max(target.block_size.minimum, disk.source.block_size.minimum)
    if options.granularity and options.granularity < least:
        raise CommandError(
            f"Parameter 'granularity' expects at least the block size {least} of the disks"
        )


def check_is_disk(disk: Disk) -> None:
    """Raise CommandError if `disk` is an old side, which is a target only."""
    if isinstance(disk.source, TargetOnly):
        raise CommandError(
            f"Node '{disk.name}' is a target only: the disk is served from '{disk.source.truth}'"
        )


def granularity_of(
    disk: Disk, target: NbdDevice, options: MirrorOptions, bitmap: NamedBitmap | None
) -> int:
    """The granularity in bytes, as QEMU chooses it: the target's cluster size, between 4 and 64
    KiB, if known; else 64 KiB; with sync=bitmap the bitmap's granularity.

    If not everything is copied, the target may have a backing file that is not in place yet: then
    the first write to a cluster must carry all of it (rule 24), and a granule is at least a
    cluster."""
    least = max(target.block_size.minimum, disk.source.block_size.minimum)
    cluster = options.cluster_bytes
    granularity = options.granularity
    if not granularity and bitmap is not None:
        granularity = min(bitmap.bitmap.granularity, GRANULARITY_MAX)
    if not granularity:
        granularity = min(GRANULARITY_DEFAULT, max(4096, cluster or GRANULARITY_DEFAULT))
    if options.sync != "full":
        preferred = target.block_size.preferred
        is_cluster = not preferred & (preferred - 1) and preferred <= GRANULARITY_MAX
        granularity = max(granularity, cluster or (preferred if is_cluster else 0))
    return max(granularity, least)


def unit_of(disk: Disk, target: NbdDevice, options: MirrorOptions, granularity: int) -> int:
    """The smallest part of a granule that is copied alone, in bytes: a sector, or a block of either
    side. A whole granule if the user chose the granularity, or if the target may have a backing
    file that is not in place yet."""
    if options.granularity or options.sync != "full":
        return granularity
    blocks = target.block_size.minimum, raw_device(disk.source).block_size.minimum
    return min(granularity, max(UNIT_MIN, *blocks))
