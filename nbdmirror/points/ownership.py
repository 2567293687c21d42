"""Who writes to a journal: its creation, and taking it over at the start of a process."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from nbdmirror.amounts import size
from nbdmirror.points.appliers_block import EXPORT_BYTES_MIN, PLACE_BYTES
from nbdmirror.points.format import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    IN_USE,
    NO_POINT,
    RING_BYTES_MIN,
    RING_START,
    SLOTS,
    Header,
    JournalError,
    State,
    Superblock,
    pack_footer,
)
from nbdmirror.points.reader import Journal, read
from nbdmirror.points.requests import Exports, Flush, Program, Read, Side, Write
from nbdmirror.points.superblocks import JournalTaken, Superblocks, find, taken_text, wall_time
from nbdmirror.points.writer import JournalWriter

RandomBytes = Callable[[int], bytes]


def new_generation(random_bytes: RandomBytes = secrets.token_bytes) -> int:
    """A number that no other process has."""
    return int.from_bytes(random_bytes(8), "little")


def check_empty(name: str, export_bytes: int) -> Program[int]:
    """Whether the export `name` of `export_bytes` can become a journal: the bytes of its ring.
    Raises JournalError if it is too small or holds anything."""
    ring_bytes = (export_bytes - RING_START) // BLOCK_BYTES * BLOCK_BYTES
    if export_bytes >= EXPORT_BYTES_MIN:
        ring_bytes -= PLACE_BYTES
    if ring_bytes < RING_BYTES_MIN:
        text = f"has {export_bytes} bytes, and a journal needs {RING_START + RING_BYTES_MIN}"
        raise JournalError(f"{name}: is too small: it {text}")
    head = bytearray(RING_START)
    yield [Read(Side.JOURNAL, memoryview(head), 0)]
    if any(head):
        what = yield from _what_is_there(name)
        text = f"{what}, zero its first {size(RING_START)}"
        raise JournalError(f"{name}: is not empty: it {text}")
    return ring_bytes


def _what_is_there(name: str) -> Program[str]:
    """And when it may be overwritten."""
    try:
        block = (yield from find(name)).current
    except JournalError:
        return "holds something; if nobody needs that"
    of = f"is the journal of a disk of {size(block.disk_bytes)}"
    if block.state is State.PROMOTED:
        since = wall_time(block.since_ns)
        return f"{of}, whose image is in use since {since}; if the journal is not needed any more"
    return (
        f"{of}, with points up to {block.newest}; if nobody needs them, and no server writes there"
    )


def is_created(name: str, disk_id: bytes) -> Program[bool]:
    """An earlier attempt has created the journal `name` for the disk `disk_id`."""
    try:
        found = yield from find(name)
    except JournalError:
        return False
    return found.current.disk_id == disk_id


def create(
    name: str,
    export_bytes: int,
    *,
    disk_bytes: int,
    now_ns: int,
    disk_id: bytes = b"",
    random_bytes: RandomBytes = secrets.token_bytes,
) -> Program[Superblock]:
    """Make an empty journal on the export `name` of `export_bytes`, for a disk of `disk_bytes`.
    `disk_id`: 16 random bytes, if the caller needs to know them before.

    Raises JournalError, having changed nothing, if the export is too small or holds anything."""
    ring_bytes = yield from check_empty(name, export_bytes)
    superblock = Superblock(
        disk_id=disk_id or random_bytes(16),
        disk_bytes=disk_bytes,
        ring_bytes=ring_bytes,
        generation=new_generation(random_bytes),
        taken=0,
        state=State.EMPTY,
        since_ns=now_ns,
        base=NO_POINT,
        base_digest=random_bytes(DIGEST_BYTES),
        is_base_offered=False,
        tail=0,
    )
    for slot in SLOTS:
        yield [Write(Side.JOURNAL, superblock.pack(), slot, is_durable=True)]
    return superblock


def claim(superblocks: Superblocks, headers: Sequence[Header], **changes: Any) -> Program[None]:
    """Before anything is built on `headers`, which were read as the chain: refuse the writer before
    by `changes` of the superblock, which keep all points on offer, and make the chain last.

    The last footer may be in a cache alone. Or its durable write has failed: then the footer can be
    read, no later flush reports that, and a power cut takes it away. So the footer is written
    again. What it vouches for was flushed before it was first sent, and each footer before it had
    been acknowledged by then, or written again. By now the writer before is refused: it could use
    the space for something else. The caller has flushed the export."""
    yield from superblocks.update(**changes)
    if headers:
        last = headers[-1]
        ((at, _),) = superblocks.current.spans(last.footer_place, BLOCK_BYTES)
        yield [Write(Side.JOURNAL, pack_footer(last), at, is_durable=True)]


def take_over(
    exports: Exports,
    *,
    disk_id: bytes,
    before: JournalWriter | None = None,
    random_bytes: RandomBytes = secrets.token_bytes,
) -> Program[JournalWriter]:
    """Become the writer of the journal of the disk `disk_id`. An earlier writer is refused from now
    on. At a server's start, and after each lost connection: `before` is the writer until then.

    Raises JournalError if the journal is another disk's, or is not what `before` has left;
    JournalTaken if a point was recovered from it, or another process has written to it since
    `before`. Nothing was changed then. An image that `before` was handing over stays handed over:
    the caller knows whether it still was. A caller without `before` compares the writer's `newest`
    with the point that it counts changes from: if the journal ends earlier, it is damaged, and the
    image must be seeded again (`JournalWriter.seed`)."""
    name = exports[Side.JOURNAL].description
    # What a server that has lost its cache still shows must not vanish later.
    yield [Flush(Side.JOURNAL)]
    known = before.headers if before is not None else ()
    journal = yield from read(name, exports[Side.JOURNAL].size, known)
    if journal.superblock.disk_id != disk_id:
        raise JournalError(f"{name}: is the journal of another disk")
    if before is not None:
        _check_continues(journal, before)
    elif journal.superblock.state in IN_USE:
        raise JournalTaken(taken_text(name, journal.superblock))
    written = before.superblocks.written if before is not None else None
    superblocks = Superblocks(name, journal.found, written)
    headers = journal.headers
    newest = headers[-1].point.sequence if headers else journal.superblock.base.sequence
    generation = new_generation(random_bytes)
    yield from claim(superblocks, headers, generation=generation, taken=newest)
    changes: dict[str, Any] = {}
    if headers and journal.superblock.state in (State.SEEDING, State.TORN):
        # The image was flushed before this footer, and whoever changes the image in place begins
        # with a tail behind the footer.
        changes = {"state": State.OK, "since_ns": headers[0].point.time_ns}
    # Not before the footer lasts: the point would be taken for one that was announced and is lost.
    yield from superblocks.update(newest=max(newest, journal.superblock.newest), **changes)
    writer = JournalWriter(exports, superblocks, headers=headers)
    writer.damage = journal.damage
    return writer


def _check_continues(journal: Journal, before: JournalWriter) -> None:
    """What a process adds is what has changed since its last point. So after a lost connection this
    point must be there, and no points of another process."""
    block, last = journal.superblock, before.superblocks.current
    # Both superblocks have the same, but for a number: one that is damaged costs one serial.
    if block.serial + len(journal.found.damage) < last.serial:
        raise JournalError(f"{journal.name}: is an older copy of what was written to it")
    before.superblocks.check_ours(block)
    number = before.newest.sequence
    digests = {header.point.sequence: header.digest for header in journal.headers}
    digests.setdefault(block.base.sequence, block.base_digest)
    newest = max(digests)
    if newest < number:
        text = f"it ends with point {newest}, and point {number} was committed"
        raise JournalError(f"{journal.name}: has lost points: {text}")
    if digests.get(number) != before.digest:
        raise JournalError(f"{journal.name}: has another point {number} than was committed")
