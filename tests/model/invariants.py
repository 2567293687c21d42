"""What must hold of a world after each step: nothing that differs is forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.world import World


def check_parts(world: World) -> None:
    """THE INVARIANT of nbdmirror/disk/ledger.py, for each part that is copied alone."""
    copied = [part for c in world.tracker._copies for part in c.parts_in(c.offset, c.end)]
    owned = copied + [(c.offset, c.length) for c in world.tracker._writes]
    for offset in range(0, world.size, world.unit):
        part = slice(offset, min(offset + world.unit, world.size))
        length = part.stop - part.start
        assert (
            world.source[part] == world.target[part]
            or world.dirty.may_be_dirty(offset // world.unit)
            or any(start <= offset and part.stop <= start + span for start, span in owned)
            or any(g.is_under_way and g.touches(offset, length) for g in world.guests)
        ), f"lost: the part at {offset} differs, is clean, and nobody is at it"


def check_durable_granules(world: World) -> None:
    """The same of what a crash of the target leaves: what may differ is told by the bitmaps
    alone, whatever copies are in flight."""
    may_differ = world.tracker.may_differ()
    for offset in range(0, world.size, world.granularity):
        granule = slice(offset, min(offset + world.granularity, world.size))
        length = granule.stop - granule.start
        assert (
            world.source[granule] == world.devices.durable[granule]
            or may_differ.is_dirty(offset, length)
            or any(g.token is not None and g.touches(offset, length) for g in world.guests)
        ), f"lost in a crash of the target: the granule at {offset}"
