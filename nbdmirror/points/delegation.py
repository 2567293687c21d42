"""Applying points by a process beside the image, as the source of the journal sees it.

    1. superblock: `applying` = the point, `applier` = who is to do that
    2. the applier (follower.py) makes the image the point, flushes the image, and says DONE
    3. superblock: `base` = the point, `applying` = `applier` = 0

The superblock names one process at each moment that may write to the image: the applier, or the
source if there is none. The source takes the image back when the applier has said that it is done,
or that it has ended. From one that says nothing any more it never takes the image back: a write of
that one may be on its way. Then another applier must be started; that one may also be ended at
once.

An applier is asked as soon as the source sees one that lives. Before one gets its first grant, the
superblock gets samples of the image from all over the disk. So one that was given another image
sees that, and writes nothing to it. What points have written would not do: there may be none yet,
or they change the same blocks again and again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

from nbdmirror.points.applier import apply
from nbdmirror.points.appliers_block import ApplierBlock, Phase, Presence, Watch, read_block
from nbdmirror.points.format import BLOCK_BYTES, SAMPLES_MAX, Sample
from nbdmirror.points.requests import Program, Read, Side
from nbdmirror.points.writer import JournalWriter

SPREAD = 32
"""Blocks of the image that an applier compares before it writes for the first time."""


def follow(
    writer: JournalWriter,
    sequence: int,
    watch: Watch,
    clock: Callable[[], float],
    *,
    last: Mapping[str, Any] | None = None,
) -> Program[None]:
    """The next step, by the writer of the journal, towards an image that is the point `sequence`;
    all of it, if there is no applier. `last`: further changes of the superblock when the image is
    that point. Raises what `applier.apply` raises."""
    block = writer.superblocks.current
    said = yield from read_block(block, writer.export_bytes)
    presence = watch.note(said, clock())
    if block.applier:
        yield from _look_after(writer, said, presence)
    elif sequence <= block.base.sequence or presence in (Presence.NONE, Presence.GONE):
        yield from apply(writer, sequence, last=last)
    elif presence is Presence.ALIVE and said is not None:
        # What a process before was applying is done first, as it is: what is still on its way of
        # that one writes the same bytes.
        point = block.applying or sequence
        changes: dict[str, Any] = {"applying": point, "applier": said.applier}
        if watch.sampled_for != said.applier and not block.applying:
            samples = (*(yield from _samples(block.disk_bytes)), *block.samples)
            changes["samples"] = samples[:SAMPLES_MAX]
        yield from writer.superblocks.update(**changes)
        watch.sampled_for = said.applier


def _samples(disk_bytes: int) -> Program[list[Sample]]:
    """What the image reads as in blocks all over the disk, its first and its last one too."""
    last = (disk_bytes - 1) // BLOCK_BYTES
    numbers = sorted({last * part // (SPREAD - 1) for part in range(SPREAD)}) if disk_bytes else []
    offsets = [number * BLOCK_BYTES for number in numbers]
    bufs = [bytearray(min(BLOCK_BYTES, disk_bytes - offset)) for offset in offsets]
    yield [Read(Side.IMAGE, memoryview(buf), at) for at, buf in zip(offsets, bufs, strict=True)]
    return [Sample(at, len(buf), zlib.crc32(buf)) for at, buf in zip(offsets, bufs, strict=True)]


def _look_after(
    writer: JournalWriter, said: ApplierBlock | None, presence: Presence
) -> Program[None]:
    """A point was given to an applier."""
    block = writer.superblocks.current
    if said is None:
        return
    header = next((h for h in writer.headers if h.point.sequence == block.applying), None)
    if header is not None and said.has_done(block, header.digest):
        yield from writer.superblocks.update(
            base=header.point,
            base_digest=header.digest,
            is_base_offered=True,
            tail=header.end,
            applying=0,
            applier=0,
            samples=said.samples,
        )
        writer.last_batch.forget()
        yield from writer.free()
    elif said.phase is Phase.ENDED:
        yield from writer.superblocks.update(applier=0)
    elif said.applier != block.applier and presence is Presence.ALIVE:
        yield from writer.superblocks.update(applier=said.applier)
