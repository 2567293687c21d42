"""Applying points: making the image what the disk was at a point of the journal.

The order, in which each step is durable before the next:

    1. every byte that will be needed is read and checked; nothing is changed if one is damaged
       (what this process has just written, and has in memory, is not read: last_batch.py)
    2. superblock: `applying` = the point
    3. the newest content of each range, from the base to the point, goes to the image
    4. the image is flushed
    5. superblock: `base` = the point, `applying` = 0

A process that ends in between loses nothing: from step 2 on the points before this one are not on
offer, and step 3 can be done again, as often as wanted, for this point or a later one. Not for an
earlier one: the image may have parts of this one by then.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

from bitarray import bitarray

from nbdmirror.devices.base import Run, pieces
from nbdmirror.points.format import SAMPLES_MAX, Header, Sample
from nbdmirror.points.reader import (
    GROUP_BYTES,
    DamagedData,
    Journal,
    Part,
    contents,
    groups,
    newest_parts,
)
from nbdmirror.points.regions import RegionMap
from nbdmirror.points.requests import Flush, Program, Request, Side, Write, Zero
from nbdmirror.points.superblocks import Found, Superblocks
from nbdmirror.points.writer import JournalWriter

WRITE_BYTES = 512 << 10
"""Writes that follow one another are joined to requests of about this size."""

ZERO_BYTES = 32 << 20
"""A longer range of zeroes takes several requests: a slow image is not silent for long."""


def check(
    journal: Journal, headers: Sequence[Header], regions: RegionMap | None = None
) -> Program[bitarray]:
    """Read all data that the last of `headers` needs. Returns which blocks of the disk it changes.
    Raises DamagedData: of all damage the one of the oldest point. `regions`: what the image has
    already, which is not read."""
    problems: list[DamagedData] = []

    def visit(parts: list[Part]) -> Program[None]:
        parts = _lacking(parts, regions)
        for group in groups(part for part in parts if not part.entry.is_zero):
            try:
                yield from contents(journal, group)
            except DamagedData as error:
                problems.append(error)

    covered = yield from newest_parts(journal, headers, visit)
    if problems:
        raise min(problems, key=lambda problem: problem.sequence)
    return covered


def put(
    journal: Journal,
    superblocks: Superblocks,
    sequence: int,
    *,
    last: Mapping[str, Any] | None = None,
    regions: RegionMap | None = None,
) -> Program[None]:
    """Steps 2 to 5 for the point `sequence`, which is on offer and was checked. `last`: further
    changes of the superblock, in step 5. `regions`: what the image has already, and keeps. Raises
    IO_ERRORS and JournalTaken."""
    headers = headers_to(journal, sequence)

    def content(samples: list[Sample]) -> Program[None]:
        def write(parts: list[Part]) -> Program[None]:
            yield from write_parts(journal, _lacking(parts, regions), samples)

        yield from newest_parts(journal, headers, write)

    yield from _put(superblocks, headers, content, last or {})


def _put(
    superblocks: Superblocks,
    headers: Sequence[Header],
    content: Callable[[list[Sample]], Program[None]],
    last: Mapping[str, Any],
) -> Program[None]:
    """`content` writes step 3, and appends what was written where."""
    changes: dict[str, Any] = {}
    if headers:
        assert headers[-1].point.sequence >= superblocks.current.applying, "not on offer"
        yield from superblocks.update(applying=headers[-1].point.sequence)
        samples: list[Sample] = []
        yield from content(samples)
        changes = {
            "base": headers[-1].point,
            "base_digest": headers[-1].digest,
            "is_base_offered": True,
            "tail": headers[-1].end,
            "applying": 0,
            "samples": tuple(samples),
        }
    yield [Flush(Side.IMAGE)]
    yield from superblocks.update(**changes, **last)


def headers_to(journal: Journal, sequence: int) -> list[Header]:
    """The headers after the base, to the point `sequence`."""
    return [header for header in journal.headers if header.point.sequence <= sequence]


def apply(
    writer: JournalWriter, sequence: int, *, last: Mapping[str, Any] | None = None
) -> Program[None]:
    """By the writer of the journal: make the image the point `sequence`, one of the writer's, and
    use the space of the points up to it again; or a later point, if that was begun before, and the
    image is between both. `last`: as for `put`. Raises DamagedData with nothing changed, IO_ERRORS
    and JournalTaken."""
    sequence = max(sequence, writer.superblocks.current.applying)
    found = Found(writer.superblocks.current, slot=0, damage=())
    headers = [h for h in writer.headers if h.place >= found.current.tail]
    journal = Journal(writer.name, found, tuple(headers), damage=(), unfinished="")
    wanted = headers_to(journal, sequence)
    runs = writer.last_batch.runs(wanted[0]) if wanted else None
    if runs is None:
        yield from check(journal, wanted)
        yield from put(journal, writer.superblocks, sequence, last=last)
    else:
        content = partial(_write_runs, runs)
        yield from _put(writer.superblocks, wanted, content, last or {})
        writer.last_batch.forget()
    yield from writer.free()


def _lacking(parts: list[Part], regions: RegionMap | None) -> list[Part]:
    """Those ranges of `parts` that the image may lack."""
    if regions is None:
        return parts
    return [
        replace(part, offset=offset, length=length)
        for part in parts
        for offset, length in regions.runs(part.offset, part.length)
    ]


def write_parts(journal: Journal, parts: Sequence[Part], samples: list[Sample]) -> Program[None]:
    """Write the content of `parts` to the image. `samples` gets what was written where."""
    zeroes = [part for part in parts if part.entry.is_zero]
    yield [
        Zero(Side.IMAGE, offset, length)
        for part in zeroes
        for offset, length in pieces(part.offset, part.length, ZERO_BYTES)
    ]
    for group in groups(part for part in parts if not part.entry.is_zero):
        found = yield from contents(journal, group)
        writes = (
            _write_of(data, part.offset, samples) for part, data in zip(group, found, strict=True)
        )
        yield list(_joined(sorted(writes, key=attrgetter("offset"))))


def _joined(writes: Iterable[Write]) -> Iterator[Write]:
    """`writes`, ascending, none over another, with those as one that follow one another: what
    guests change in small pieces is a large range after a while."""
    run: list[Write] = []
    length = 0
    for write in writes:
        if run and (write.offset != run[0].offset + length or length >= WRITE_BYTES):
            yield _as_one(run)
            run, length = [], 0
        run.append(write)
        length += len(write.buf)
    if run:
        yield _as_one(run)


def _as_one(run: Sequence[Write]) -> Write:
    first = run[0]
    if len(run) == 1:
        return first
    return replace(first, buf=b"".join(write.buf for write in run))


def _write_runs(runs: Sequence[Run], samples: list[Sample]) -> Program[None]:
    requests: list[Request] = []
    length = 0
    for offset, span, data in runs:
        if data is None:
            requests.append(Zero(Side.IMAGE, offset, span))
            continue
        requests.append(_write_of(data, offset, samples))
        length += span
        if length >= GROUP_BYTES:
            yield requests
            requests, length = [], 0
    yield requests


def _write_of(data: memoryview, offset: int, samples: list[Sample]) -> Write:
    if len(samples) < SAMPLES_MAX:
        samples.append(Sample(offset, len(data), zlib.crc32(data)))
    return Write(Side.IMAGE, data, offset)
