"""`nbdmirror points` and `nbdmirror recover`: journals of points, without a server."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nbdmirror.amounts import size as size_text
from nbdmirror.cli.common import DONE, FAILED, CliError, absolute_uri
from nbdmirror.cli.places import check_disk, check_journal
from nbdmirror.cli.streams import say
from nbdmirror.devices.base import BlockDevice
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import ConfigError, DeviceError, Error
from nbdmirror.nbd_uri import is_uri
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.pair import are_same, check_pair, why_unfit
from nbdmirror.points.format import BLOCK_BYTES, Point, State
from nbdmirror.points.reader import Journal, read
from nbdmirror.points.recovery import recover
from nbdmirror.points.requests import Side, run
from nbdmirror.points.superblocks import wall_time

AGAIN = "run the command again"


def run_command(args: argparse.Namespace) -> int:
    try:
        return _list(args) if args.command == "points" else _recover(args)
    except Error as error:
        again = f"; {AGAIN}" if isinstance(error, DeviceError) else ""
        raise CliError(f"{error}{again}") from error


# nbdmirror points


def _list(args: argparse.Namespace) -> int:
    place = _absolute("JOURNAL", args.journal_uri)
    with _opened("JOURNAL", place, read_only=True) as device:
        journal = run(read(device.description, device.size), {Side.JOURNAL: device})
    print(json.dumps(_as_json(journal), indent=2) if args.json else _as_text(journal))
    for line in journal.damage:
        say(f"nbdmirror: {journal.name}: {line}")
    return FAILED if journal.damage else DONE


def _used_bytes(journal: Journal) -> int:
    tail = journal.superblock.tail
    return (journal.headers[-1].end if journal.headers else tail) - tail


def _sizes(journal: Journal) -> dict[int, int]:
    """By the numbers of points: what they take of the journal. The one that the image holds takes
    nothing, and is not there."""
    return {header.point.sequence: header.end - header.place for header in journal.headers}


def _as_json(journal: Journal) -> dict[str, Any]:
    block, sizes = journal.superblock, _sizes(journal)
    return {
        "journal": journal.name,
        "state": block.state.name.lower(),
        "since": wall_time(block.since_ns),
        "disk-bytes": block.disk_bytes,
        "ring-bytes": block.ring_bytes,
        "used-bytes": _used_bytes(journal),
        "points": [
            {
                "sequence": point.sequence,
                "time": wall_time(point.time_ns),
                "name": point.name,
                "group": point.group,
                "bytes": sizes.get(point.sequence, 0),
            }
            for point in journal.points
        ],
        "damage": list(journal.damage),
    }


def _as_text(journal: Journal) -> str:
    block, points = journal.superblock, journal.points
    used, ring = size_text(_used_bytes(journal)), size_text(block.ring_bytes)
    head = f"{journal.name}: a disk of {size_text(block.disk_bytes)}, {used} of {ring} used"
    since = wall_time(block.since_ns)
    count = f"{len(points)} point{'s' if len(points) != 1 else ''}"
    states = {
        State.EMPTY: "no point yet: the mirror has not begun",
        State.SEEDING: f"no point yet: the image is being copied for the first time since {since}",
        State.TORN: f"no point: the image is being copied in place since {since}",
        State.PROMOTED: f"recovered at {since}: the image is in use",
        State.SERVED: f"point {block.applying} is served since {since}: the image becomes it",
    }
    lines = [f"{head}; {states.get(block.state, count)}"]
    if points:
        rows, sizes = [("point", "time", "size", "name")], _sizes(journal)
        for point in points:
            size = size_text(sizes[point.sequence]) if point.sequence in sizes else "image"
            rows.append((str(point.sequence), wall_time(point.time_ns), size, point.name))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for number, at, size, name in rows:
            line = f"{number:>{widths[0]}}  {at:{widths[1]}}  {size:>{widths[2]}}  {name}"
            lines.append(f"  {line.rstrip()}")
    return "\n".join(lines)


# nbdmirror recover


def _recover(args: argparse.Namespace) -> int:
    place, other = _absolute("--image", args.image), _absolute("--journal", args.journal)
    if are_same(place, other):
        raise CliError("--journal: names the same disk as --image")
    with (
        _opened("--image", place) as image,
        _opened("--journal", other) as journal,
    ):
        check_pair(image, journal)
        program = recover(
            journal.description,
            journal.size,
            image.size,
            wanted=args.point,
            now_ns=time.time_ns(),
            on_point=_tell,
        )
        found = run(program, {Side.IMAGE: image, Side.JOURNAL: journal})
        point = found.point
        name = f" ({point.name})" if point.name else ""
        text = f"{image.description} is point {point.sequence}{name} of {wall_time(point.time_ns)}"
        print(f"{text}; it was recovered before" if found.was_done else text)
    return DONE


def _tell(journal: Journal, point: Point) -> None:
    for line in journal.damage:
        say(f"nbdmirror: warning: {journal.name}: {line}")
    size = sum(h.payload_bytes for h in journal.headers if h.point.sequence <= point.sequence)
    say(f"recovering point {point.sequence} of {wall_time(point.time_ns)}, {size_text(size)}")


def _absolute(option: str, place: str) -> str:
    return absolute_uri(place, f"{option}: ") if is_uri(place) else place


@contextmanager
def _opened(option: str, place: str, *, read_only: bool = False) -> Iterator[BlockDevice]:
    """A disk that is named by a path or an NBD URI. Raises CliError, which begins with `option`."""
    try:
        device = _open(option, place, read_only)
    except ConfigError as error:
        raise CliError(f"{option}: {error}") from error
    try:
        yield device
    except OSError as error:
        text = f"{device.description}: {error.strerror or error}; {AGAIN}"
        raise CliError(text) from error
    finally:
        device.close()


def _open(option: str, place: str, read_only: bool) -> BlockDevice:
    if not is_uri(place):
        if option == "--image":
            check_disk(place)
        else:
            check_journal(place)
        return FileDevice.open(place, read_only=read_only)
    device = NbdDevice.open(place)
    if not read_only and (problem := why_unfit(device, BLOCK_BYTES)):
        device.close()
        raise ConfigError(f"{device.uri}: {problem}")
    return device
