"""Recovery: a journal's points as a user names them, and an image made of one of them."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from bitarray import bitarray

from nbdmirror.names import is_number, parse_time
from nbdmirror.points.applier import check, headers_to, put
from nbdmirror.points.format import (
    BLOCK_BYTES,
    IN_USE,
    MAGIC,
    SLOTS,
    JournalError,
    Point,
    State,
    Superblock,
)
from nbdmirror.points.ownership import RandomBytes, claim, new_generation
from nbdmirror.points.reader import DamagedData, Journal, read
from nbdmirror.points.regions import RegionMap, read_map
from nbdmirror.points.requests import Flush, Program, Read, Side, Write
from nbdmirror.points.superblocks import Superblocks, wall_time
from nbdmirror.points.withdrawal import until_rests


def choose(journal: Journal, text: str | None) -> Point:
    """The point that a user means: its number, its name (the newest point of that name), or a time
    (the newest point that is not later); None: the newest. Raises JournalError."""
    points = journal.points
    if not points:
        raise JournalError(f"{journal.name}: {why_none(journal)}")
    first, last = points[0], points[-1]
    if text is None and journal.is_cut_short:
        text = f"{journal.damage[-1]}; the newest point before that is {last.sequence}"
        raise JournalError(f"{journal.name}: {text}: name it with --point {last.sequence}")
    if text is None:
        return last
    if is_number(text):
        found = [point for point in points if point.sequence == int(text)]
        offer = f"{first.sequence} to {last.sequence}"
    elif any(point.name == text for point in points):
        found = [point for point in points if point.name == text]
    elif (time_ns := parse_time(text)) is not None:
        found = [point for point in points if point.time_ns <= time_ns]
        offer = f"{wall_time(first.time_ns)} to {wall_time(last.time_ns)}"
    else:
        found, offer = [], f"{first.sequence} to {last.sequence}"
    if not found and journal.superblock.state in IN_USE:
        when = wall_time(journal.superblock.since_ns)
        is_served = journal.superblock.state is State.SERVED
        text = f"is served since {when}" if is_served else f"was recovered at {when}"
        text = f"point {first.sequence} {text}: there is no other point any more"
        raise JournalError(f"{journal.name}: {text}")
    if not found:
        raise JournalError(f"{journal.name}: has no point {text!r}: it has {offer}")
    return found[-1]


def why_none(journal: Journal) -> str:
    block = journal.superblock
    since = wall_time(block.since_ns)
    if block.state is State.EMPTY:
        return "has no point yet: the mirror has not begun"
    if block.state is State.SEEDING:
        return f"has no point yet: the image is being copied for the first time, since {since}"
    if block.state is State.TORN:
        return f"has no point: the image is being copied in place since {since}"
    return f"has no point any more: {'; '.join(journal.damage) or 'the chain is empty'}"


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a recovery did."""

    point: Point
    done_ns: int = 0
    """Since this wall time, in nanoseconds since 1970, the image is in use: an earlier recovery had
    made it this point. 0: this recovery has."""

    @property
    def was_done(self) -> bool:
        return bool(self.done_ns)


def recover(
    name: str,
    export_bytes: int,
    image_bytes: int,
    *,
    wanted: str | None,
    now_ns: int,
    random_bytes: RandomBytes = secrets.token_bytes,
    on_point: Callable[[Journal, Point], None] = lambda journal, point: None,
) -> Program[Recovered]:
    """Make the image a point of the journal `name`, flushed, and the journal `promoted`: a source
    that comes back is refused. May be ended at any moment, and run again.

    Raises JournalError, with neither image nor journal changed, if that is not possible, and
    IO_ERRORS. `on_point` is told what will be recovered, before anything is changed."""
    journal = yield from read(name, export_bytes)
    check_size(journal.name, journal.superblock, image_bytes)
    point = choose(journal, wanted)
    if journal.superblock.state is State.PROMOTED:
        yield from confirm(journal)
        return Recovered(point, journal.superblock.since_ns)
    try:
        yield from check_point(journal, point)
    except DamagedData as error:
        raise JournalError(f"{error}; {_advice(journal, error.sequence)}") from error
    on_point(journal, point)
    plan = Promotion(journal, point, now_ns, random_bytes)
    yield from fence(plan)
    yield from promote(plan)
    return Recovered(point)


def confirm(journal: Journal) -> Program[None]:
    """Before the image is used of a journal that was read as `promoted`: make that last. The bytes
    stay the same."""
    block, at = journal.superblock.pack(), SLOTS[journal.found.slot]
    yield [Write(Side.JOURNAL, block, at, is_durable=True)]


def check_point(journal: Journal, point: Point) -> Program[None]:
    """Raise DamagedData if data is damaged that `point` needs, and JournalError if the image surely
    does not belong to the journal. Changes nothing."""
    regions = yield from _regions(journal)
    covered = yield from check(journal, headers_to(journal, point.sequence), regions)
    if regions is None:  # else guests may have changed what is compared
        yield from check_image(journal, covered)


def _regions(journal: Journal) -> Program[RegionMap | None]:
    """What the image has already of the point that is served; None: no point is."""
    if journal.superblock.state is not State.SERVED:
        return None
    return (yield from read_map(journal.superblock))


class Promotion:
    """What is needed to make an image the point `point` of `journal`, which was checked."""

    def __init__(
        self, journal: Journal, point: Point, now_ns: int, random_bytes: RandomBytes
    ) -> None:
        self.journal = journal
        self.point = point
        self.superblocks = Superblocks(journal.name, journal.found)
        generation = new_generation(random_bytes)
        self.first = {
            "generation": generation,
            "taken": journal.points[-1].sequence,
            "applier": 0,
        }
        """The old source is refused from this change of the superblock on, and no applier writes to
        the image any more when it has seen this."""
        self.last = {
            "generation": generation,
            "taken": point.sequence,
            "state": State.PROMOTED,
            "since_ns": now_ns,
            "newest": point.sequence,
        }


def fence(plan: Promotion) -> Program[None]:
    """Refuse the old source and its applier, or the server of the point, and make the chain last,
    before the image is changed. All points stay on offer. Raises JournalTaken if the journal has
    changed since it was read, and JournalError if an applier does not stop."""
    journal = plan.journal
    yield [Flush(Side.JOURNAL)]
    yield from claim(plan.superblocks, journal.headers, **plan.first)
    yield from until_rests(journal.name, plan.superblocks.current, journal.export_bytes)


def promote(plan: Promotion) -> Program[None]:
    """After `fence`: make the image the point."""
    regions = yield from _regions(plan.journal)
    sequence = plan.point.sequence
    yield from put(plan.journal, plan.superblocks, sequence, last=plan.last, regions=regions)


def _advice(journal: Journal, damaged: int) -> str:
    """What to do if the batch of the point `damaged` cannot be used."""
    older = [point.sequence for point in journal.points if point.sequence < damaged]
    if not older or journal.superblock.state is State.SERVED:
        return "no older point can be recovered"
    return f"the newest point before that is {older[-1]}: recover it with --point {older[-1]}"


def check_size(name: str, block: Superblock, image_bytes: int) -> None:
    """Raise JournalError if an image of `image_bytes` is too small for the disk of the journal
    `name`."""
    disk_bytes = block.disk_bytes
    if image_bytes < disk_bytes:
        sizes = f"it has {image_bytes} bytes, and the disk has {disk_bytes}"
        raise JournalError(f"{name}: is the journal of another disk than the image: {sizes}")


def check_image(journal: Journal, changed: bitarray) -> Program[None]:
    """Raise JournalError if the image surely does not belong to the journal. `changed`: blocks that
    may have changed since it held the base, if a point is being applied."""
    block = journal.superblock
    head = bytearray(min(BLOCK_BYTES, block.disk_bytes))
    yield [Read(Side.IMAGE, memoryview(head), 0)]
    if head.startswith(MAGIC):
        raise JournalError(f"{journal.name}: what is given as its image is a journal too")
    yield from check_samples(journal.name, block, changed)


def check_samples(name: str, block: Superblock, changed: bitarray | None = None) -> Program[None]:
    """Raise JournalError if the image is not what the superblock of the journal `name` says.
    `changed`: as for check_image; without it an image to which a point is being applied is not
    compared."""
    if block.applying and changed is None:
        return
    for sample in block.samples:
        first, end = (
            sample.offset // BLOCK_BYTES,
            -(-(sample.offset + sample.length) // BLOCK_BYTES),
        )
        if block.applying and changed is not None and changed.find(True, first, end) >= 0:
            continue
        buf = bytearray(sample.length)
        yield [Read(Side.IMAGE, memoryview(buf), sample.offset)]
        if zlib.crc32(buf) != sample.crc:
            text = f"the image does not hold point {block.base.sequence}, on which this builds"
            where = f"it differs at {sample.offset}: it is another disk's, or was written to"
            raise JournalError(f"{name}: {text}; {where}")
