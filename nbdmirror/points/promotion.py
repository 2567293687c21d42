"""Serving a point to guests that write, as its journal sees it: which point, taking the journal,
and the end.

    ok -> served (`take`) -> promoted (`finish`), when the image has all of the point

`take` may be done again in `served`, by the next process after one that has ended.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from bitarray import bitarray

from nbdmirror.points.applier import headers_to
from nbdmirror.points.format import Point, State
from nbdmirror.points.index import Index, index_to
from nbdmirror.points.ownership import RandomBytes, claim, new_generation
from nbdmirror.points.reader import Journal, read
from nbdmirror.points.recovery import check_image, check_size, choose
from nbdmirror.points.regions import RegionMap, read_map, write_map
from nbdmirror.points.requests import Devices, Flush, Program, Side, run
from nbdmirror.points.superblocks import TAKEN, JournalTaken, Superblocks
from nbdmirror.points.withdrawal import until_rests

ATTEMPTS_MAX = 10
"""How often the point is looked for again if the source changes the journal meanwhile."""


@dataclass(frozen=True, slots=True)
class Found:
    """A point that can be served to guests that write."""

    journal: Journal
    point: Point
    index: Index
    regions: RegionMap
    """What the image has of it."""
    needed: bitarray
    """A bit for each region: 1: the journal has something of the point there."""

    @property
    def is_in_image(self) -> bool:
        """The image was made this point, and guests may have changed the image since."""
        return self.journal.superblock.state is State.PROMOTED


def look_up(
    name: str, export_bytes: int, image_bytes: int, *, wanted: str | None = None
) -> Program[Found]:
    """Find the point that a user means (`recovery.choose`). Changes nothing. Raises JournalError,
    and IO_ERRORS."""
    journal = yield from read(name, export_bytes)
    check_size(name, journal.superblock, image_bytes)
    point, block = choose(journal, wanted), journal.superblock
    regions = RegionMap.empty(block.disk_bytes)
    if block.state is State.PROMOTED:
        return Found(journal, point, Index([]), regions, needed=regions.bits)
    index, changed = yield from index_to(journal, point.sequence)
    if block.state is State.SERVED:  # guests may have changed what the samples were
        regions = yield from read_map(block)
    else:
        yield from check_image(journal, changed)
    return Found(journal, point, index, regions, needed=regions.of_blocks(changed))


def take(found: Found, *, now_ns: int, random_bytes: RandomBytes) -> Program[Superblocks]:
    """Make the journal this process's. The old source and its applier are refused from now on.
    Raises IO_ERRORS, JournalTaken if the journal has changed since `found`, and JournalError if an
    applier does not stop."""
    journal = found.journal
    superblocks = Superblocks(journal.name, journal.found)
    first: dict[str, Any] = {"generation": new_generation(random_bytes), "applier": 0}
    changes: dict[str, Any] = {}
    if journal.superblock.state is State.OK:
        first["taken"] = journal.points[-1].sequence
        changes = {"state": State.SERVED, "applying": found.point.sequence, "samples": ()}
        changes["since_ns"] = now_ns
    if not headers_to(journal, found.point.sequence):  # the image is the point already
        changes = {"state": State.PROMOTED, "since_ns": now_ns, **_end_of(found.point)}
    yield [Flush(Side.JOURNAL)]
    yield from claim(superblocks, journal.headers, **first)
    yield from until_rests(journal.name, superblocks.current, journal.export_bytes)
    if changes:
        yield from superblocks.update(**changes)
    return superblocks


def looked_up(sides: Devices, wanted: str | None) -> Found:
    """`look_up`, carried out."""
    image, journal = sides[Side.IMAGE], sides[Side.JOURNAL]
    program = look_up(journal.description, journal.size, image.size, wanted=wanted)
    return run(program, sides)


def taken(
    found: Found, sides: Devices, wanted: str | None, *, now_ns: int
) -> tuple[Found, Superblocks]:
    """`take`, carried out, also if the source makes points meanwhile."""
    for _ in range(ATTEMPTS_MAX):
        try:
            superblocks = run(take(found, now_ns=now_ns, random_bytes=secrets.token_bytes), sides)
        except JournalTaken:
            found = looked_up(sides, wanted)
            continue
        found = replace(found, journal=with_superblock(found.journal, superblocks))
        if superblocks.current.state is State.SERVED:  # no other server changes it from now on
            found = replace(found, regions=run(_lasting_map(superblocks), sides))
        return found, superblocks
    raise JournalTaken(f"{found.journal.name}: {TAKEN}")


def _lasting_map(superblocks: Superblocks) -> Program[RegionMap]:
    """The map that counts, durably: its write may have failed, which no later flush would report,
    and guests are going to write where it has a bit."""
    found = yield from read_map(superblocks.current)
    if found.serial:
        found = replace(found, serial=found.serial + 1)
        yield from write_map(superblocks.current, found)
    return found


def finish(found: Found, superblocks: Superblocks) -> Program[None]:
    """The image has the point, durably: write that down. Raises IO_ERRORS and JournalTaken."""
    header = headers_to(found.journal, found.point.sequence)[-1]
    yield from superblocks.update(
        base=header.point,
        base_digest=header.digest,
        is_base_offered=True,
        tail=header.end,
        state=State.PROMOTED,
        **_end_of(found.point),
    )


def _end_of(point: Point) -> dict[str, Any]:
    """What a superblock says when the image is `point`, and guests may have changed the image."""
    return {"applying": 0, "taken": point.sequence, "newest": point.sequence, "samples": ()}


def with_superblock(journal: Journal, superblocks: Superblocks) -> Journal:
    """`journal` with what its superblock says now."""
    return replace(journal, found=replace(journal.found, current=superblocks.current))
