"""The conditions on a journal for a mirror with points to begin, and the granularity of points."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass, field, replace
from functools import partial

from nbdmirror.devices.base import BlockDevice
from nbdmirror.disk.changes import Changes
from nbdmirror.disk.disk import Disk
from nbdmirror.errors import CommandError, Error
from nbdmirror.mirror.options import MirrorOptions
from nbdmirror.mirror.point_source import STORE_BYTES_DEFAULT
from nbdmirror.points.format import BLOCK_BYTES
from nbdmirror.points.ownership import check_empty
from nbdmirror.points.requests import Side, run
from nbdmirror.server.nodes import Node
from nbdmirror.server.target_checks import check_target
from nbdmirror.state.null_store import NewBitmap

GRANULES_MAX = 1 << 24
"""Granules are blocks of the journal as long as there are not more of them: their bitmaps have 2
MiB then, and a guest that overwrites one saves 4 KiB."""

GRANULARITY = 64 << 10

GROUP_BITS = 53


@dataclass(frozen=True, slots=True)
class PointsOptions:
    """What a job with copy mode points was asked for, beside the options of every mirror."""

    journal: Node | None
    """None: points are snapshots of the target, which somebody else makes."""
    interval_s: float = 1.0
    """From the cut of one point to the cut of the next one, at least."""
    keep_s: float = 0.0
    """For how long points are kept in the journal."""
    rpo_s: float = 0.0
    """The lag that is promised; 0: none is."""
    store_bytes: int = STORE_BYTES_DEFAULT
    """Memory for what guests overwrite before it was read for a point."""
    spill_bytes: int = 0
    """The size of the file for what does not fit into that; 0: no file."""
    breaks_guest_writes: bool = False
    """What has no room fails the guest's write, and not the point."""
    in_place: bool = False
    """What does not fit into the journal is copied in place, and points are given up for that
    time."""
    key: str = field(default_factory=lambda: f"points-{uuid.uuid4().hex}")
    """Names what is in no committed point, where that is saved."""
    disk_id: bytes = field(default_factory=partial(secrets.token_bytes, 16))
    """The disk's, in the journal."""
    group: str = ""
    """In an earlier process the job made its points with others that had the same here; "":
    alone."""


def new_group() -> int:
    """A number for the points of one cut, from 1 to 2**53: programs that read JSON have whole
    numbers of this size. Drawn, so that nothing has to be kept over a restart. Two of a million
    cuts have the same one with a chance of 1 in 20,000; they still differ in their times."""
    return 1 + secrets.randbelow(1 << GROUP_BITS)


def check_journal(disk: Disk, journal: Node, options: MirrorOptions) -> None:
    """Raise CommandError if points of `disk` cannot be written there, independent of other jobs."""
    # As a target whose content counts: a journal is no place for the old side of a disk.
    check_target(disk, journal, replace(options, target_is_zero=True, granularity=0))
    check_content(disk)
    least = journal.device.block_size.minimum
    if least > BLOCK_BYTES:
        text = f"its minimum block size is {least}, and a journal has blocks of {BLOCK_BYTES}"
        raise CommandError(f"'{journal.device.uri}' cannot hold points: {text}")


def check_content(disk: Disk) -> None:
    """Raise CommandError if there is nothing that a point could have."""
    if not disk.size:
        raise CommandError(f"Node '{disk.name}' has no content")


def check_new_journal(device: BlockDevice) -> None:
    """Raise CommandError unless the export can become a journal. Blocks; changes nothing."""
    try:
        run(check_empty(device.description, device.size), {Side.JOURNAL: device})
    except (Error, OSError) as error:
        raise CommandError(f"Journal {error}") from error


def changes_of(
    disk: Disk, options: MirrorOptions, granularity: int, unit: int, new_bitmap: NewBitmap
) -> Changes:
    """What guests change, for points. `granularity` and `unit`: those of the first copy."""
    if options.granularity:
        return Changes(disk, max(granularity, BLOCK_BYTES), new_bitmap)
    if unit <= BLOCK_BYTES and disk.size <= GRANULES_MAX * BLOCK_BYTES:
        return Changes(disk, BLOCK_BYTES, new_bitmap)
    return Changes(disk, max(GRANULARITY, unit), new_bitmap, unit=max(BLOCK_BYTES, unit))
