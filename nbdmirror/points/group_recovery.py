"""Recovery of several disks of one guest: all images are made one moment.

    read all -> choose the moment -> check all -> refuse the old sources -> recover one by one

Nothing is changed before everything was checked, and no image before all sources are refused, so
that none of them applies a later point to its image meanwhile. A recovery that was ended on its way
can be run again: journals that are promoted by then have one moment, which all others must have.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Sequence

from nbdmirror.errors import DeviceError
from nbdmirror.names import is_number, parse_time
from nbdmirror.points.format import JournalError, Point, State
from nbdmirror.points.ownership import RandomBytes
from nbdmirror.points.reader import DamagedData, Journal, read
from nbdmirror.points.recovery import (
    Promotion,
    Recovered,
    check_point,
    check_size,
    confirm,
    fence,
    promote,
    why_none,
)
from nbdmirror.points.requests import Devices, Program, Result, Side, run
from nbdmirror.points.superblocks import wall_time

Instant = tuple[Point, ...]
"""A point of each journal, of one moment."""


def recover_group(
    pairs: Sequence[Devices],
    *,
    wanted: str | None,
    now_ns: int,
    random_bytes: RandomBytes = secrets.token_bytes,
    on_instant: Callable[[Sequence[Journal], Instant], None] = lambda journals, instant: None,
) -> list[Recovered]:
    """Make the images of `pairs` of image and journal one moment: the newest that all journals
    have; `wanted`: the newest of this name, or that is not later than this time. Blocks. May be
    ended at any moment, and run again with the same arguments, for the same moment.

    Raises JournalError, with nothing changed, if that is not possible, and IO_ERRORS. `on_instant`
    is told what will be recovered, before anything is changed."""
    journals = [_run(_read(sides), sides) for sides in pairs]
    _check_different(journals)
    instant = choose_instant(journals, wanted)
    parts = list(zip(pairs, journals, instant, strict=True))
    _check_data(parts)
    on_instant(journals, instant)
    for sides, journal, _ in parts:
        if _is_promoted(journal):
            _run(confirm(journal), sides)
    plans = [
        (sides, Promotion(journal, point, now_ns, random_bytes))
        for sides, journal, point in parts
        if not _is_promoted(journal)
    ]
    for sides, plan in plans:
        _run(fence(plan), sides)
    for sides, plan in plans:
        _run(promote(plan), sides)
    return [
        Recovered(point, journal.superblock.since_ns if _is_promoted(journal) else 0)
        for _, journal, point in parts
    ]


def _run(program: Program[Result], sides: Devices) -> Result:
    """Errors of files do not name them."""
    try:
        return run(program, sides)
    except OSError as error:
        names = " or ".join(sides[side].description for side in (Side.IMAGE, Side.JOURNAL))
        raise DeviceError(f"{names}: {error.strerror or error}", error.errno or 0) from error


def _read(sides: Devices) -> Program[Journal]:
    device = sides[Side.JOURNAL]
    journal = yield from read(device.description, device.size)
    check_size(journal.name, journal.superblock, sides[Side.IMAGE].size)
    return journal


def _check_different(journals: Sequence[Journal]) -> None:
    """Two names of one export may not be seen to be the same; its content is."""
    for one, other in itertools.combinations(journals, 2):
        if one.superblock.disk_id == other.superblock.disk_id:
            raise JournalError(f"{other.name}: is the journal of the same disk as {one.name}")


def _is_promoted(journal: Journal) -> bool:
    return journal.superblock.state is State.PROMOTED


# The moment.


def instants(journals: Sequence[Journal]) -> list[Instant]:
    """The moments that all journals have, oldest first."""
    tables = [
        {(point.group, point.time_ns): point for point in journal.points if point.group}
        for journal in journals
    ]
    return [
        tuple(table[key] for table in tables)
        for key in tables[0]
        if all(key in table for table in tables)
    ]


def choose_instant(journals: Sequence[Journal], wanted: str | None) -> Instant:
    """The moment that a user means. Raises JournalError."""
    for journal in journals:
        if not journal.points:
            raise JournalError(f"{journal.name}: {why_none(journal)}")
    if wanted is not None and is_number(wanted):
        text = "the points of one moment have other numbers in other journals"
        raise JournalError(f"--point {wanted}: {text}: name a time, or the name of a point")
    _check_promoted(journals)
    found = instants(journals)
    if not found:
        raise JournalError(f"no moment is in all journals: {_what_each_has(journals)}")
    promoted = [journal for journal in journals if _is_promoted(journal)]
    cut_short = [journal for journal in journals if journal.is_cut_short]
    if wanted is None and cut_short and not promoted:
        text = f"{cut_short[0].name}: {cut_short[0].damage[-1]}"
        raise JournalError(f"{text}; {_advice(found)}")
    if wanted is None:
        return found[-1]
    chosen = _wanted(found, wanted)
    if chosen is None and promoted:
        raise JournalError(f"{_recovered(promoted[0])}: there is no other moment any more")
    if chosen is None:
        first, last = (wall_time(found[at][0].time_ns) for at in (0, -1))
        raise JournalError(f"no moment of all journals is {wanted!r}: there are {first} to {last}")
    return chosen


def _wanted(found: Sequence[Instant], wanted: str) -> Instant | None:
    named = [one for one in found if all(point.name == wanted for point in one)]
    if not named and (time_ns := parse_time(wanted)) is not None:
        named = [one for one in found if one[0].time_ns <= time_ns]
    return named[-1] if named else None


def _check_promoted(journals: Sequence[Journal]) -> None:
    """Raise JournalError if recoveries have ended at different moments, or at one of one disk."""
    promoted = [journal for journal in journals if _is_promoted(journal)]
    for journal in promoted:
        if not journal.superblock.base.group:
            text = "which is a point of this disk alone"
            raise JournalError(f"{_recovered(journal)}, {text}")
        one, other = promoted[0].superblock.base, journal.superblock.base
        if (one.group, one.time_ns) != (other.group, other.time_ns):
            raise JournalError(f"{_recovered(promoted[0])}, and {_recovered(journal)}")


def _recovered(journal: Journal) -> str:
    block = journal.superblock
    text = f"point {block.base.sequence} of {wall_time(block.base.time_ns)} was recovered"
    return f"{journal.name}: {text} at {wall_time(block.since_ns)}"


def _what_each_has(journals: Sequence[Journal]) -> str:
    texts = []
    for journal in journals:
        points = [point for point in journal.points if point.group]
        text = f"{len(points)} of {len(journal.points)} points are of a group"
        if points:
            text += f", {wall_time(points[0].time_ns)} to {wall_time(points[-1].time_ns)}"
        texts.append("; ".join([f"{journal.name}: {text}", *journal.damage]))
    return "; ".join(texts)


# Damage.


def _check_data(parts: Sequence[tuple[Devices, Journal, Point]]) -> None:
    """Raise JournalError if one of the points cannot be recovered: of all damage the first, with
    the newest moment that is older than all of it."""
    ends: list[float] = []
    first = ""
    for sides, journal, point in parts:
        ends.append(math.inf)
        if _is_promoted(journal):
            continue
        try:
            _run(check_point(journal, point), sides)
        except DamagedData as error:
            first, ends[-1] = first or str(error), error.sequence
    if not first:
        return
    sound = [
        instant
        for instant in instants([journal for _, journal, _ in parts])
        if all(point.sequence < end for point, end in zip(instant, ends, strict=True))
    ]
    raise JournalError(f"{first}; {_advice(sound)}")


def _advice(older: Sequence[Instant]) -> str:
    """`older`: the moments that are not damaged, as far as is known."""
    if not older:
        return "no older moment can be recovered"
    time = wall_time(older[-1][0].time_ns)
    text = f"the newest moment before that, which all journals have, is {time}"
    return f"{text}: recover it with --point '{time}'"
