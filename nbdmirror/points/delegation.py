"""Applying points by a process beside the image, as the source of the journal sees it.

    1. superblock: `applying` = the point, `applier` = who is to do that
    2. the applier (follower.py) makes the image the point, flushes the image, and says DONE
    3. superblock: `base` = the point, `applying` = `applier` = 0

The superblock names one process at each moment that may write to the image: the applier, or the
source if there is none. The source takes the image back when the applier has said that it is done,
or that it has ended. From one that says nothing any more it never takes the image back: a write of
that one may be on its way. Then another applier must be started; that one may also be ended at
once.

An applier is asked as soon as the source sees one that lives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nbdmirror.points.applier import apply
from nbdmirror.points.appliers_block import ApplierBlock, Phase, Presence, Watch, read_block
from nbdmirror.points.requests import Program
from nbdmirror.points.writer import JournalWriter


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
        yield from writer.superblocks.update(applying=point, applier=said.applier)


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
