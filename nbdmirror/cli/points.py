"""`nbdmirror points` and `nbdmirror recover`: journals of points, without a server."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from nbdmirror.amounts import size as size_text
from nbdmirror.cli.attended import Attended
from nbdmirror.cli.common import DONE, FAILED, USAGE, CliError, absolute_uri
from nbdmirror.cli.places import check_disk, check_journal
from nbdmirror.cli.streams import say
from nbdmirror.devices.base import BlockDevice, raw_device
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import ConfigError, DeviceError, Error
from nbdmirror.foreign_text import visible
from nbdmirror.nbd_uri import is_uri
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.pair import are_same, check_pair, why_unfit
from nbdmirror.points.appliers_block import ApplierBlock, Phase, read_block
from nbdmirror.points.format import BLOCK_BYTES, Point, State, Superblock
from nbdmirror.points.group_recovery import Instant, recover_group
from nbdmirror.points.reader import Journal, read
from nbdmirror.points.recovery import Recovered, recover
from nbdmirror.points.requests import Devices, Side, run
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
        sides: Devices = {Side.JOURNAL: device}
        journal = run(read(device.description, device.size), sides)
        said = run(read_block(journal.superblock, device.size), sides)
    print(json.dumps(_as_json(journal, said), indent=2) if args.json else _as_text(journal, said))
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


def _asked_for(block: Superblock) -> int:
    """The point that an applier is to make the image; 0: none."""
    return block.applying if block.applier else 0


def _as_json(journal: Journal, said: ApplierBlock | None) -> dict[str, Any]:
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
        "applier": None if said is None else _applier_as_json(said),
        "applier-asked-for": _asked_for(block),
        "damage": list(journal.damage),
    }


def _applier_as_json(said: ApplierBlock) -> dict[str, Any]:
    time = wall_time(said.time_ns)
    return {"phase": said.phase.name.lower(), "point": said.point, "time": time}


def _as_text(journal: Journal, said: ApplierBlock | None) -> str:
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
    if text := _applier_as_text(block, said):
        lines.append(f"  `nbdmirror apply` {text}")
    if points:
        lines += _table(journal, points)
    return "\n".join(lines)


def _applier_as_text(block: Superblock, said: ApplierBlock | None) -> str:
    """What the last applier does, and what the source waits for; empty if there was none."""
    asked = _asked_for(block)
    if said is None:
        return f"has said nothing, and is asked for point {asked}" if asked else ""
    time = wall_time(said.time_ns)
    if said.phase is Phase.ENDED:
        return f"has ended, at {time}" + (f"; point {asked} waits for it" if asked else "")
    text = "waits for points"
    if said.phase in (Phase.WORKING, Phase.DONE):
        verb = "makes" if said.phase is Phase.WORKING else "has made"
        text = f"{verb} the image point {said.point}"
    if asked and said.applier != block.applier:
        text += f"; point {asked} waits for another one"
    elif asked and said.point != asked:
        text += f", and is asked for point {asked}"
    return f"{text}; its last sign of life was at {time}"


def _table(journal: Journal, points: Sequence[Point]) -> Iterator[str]:
    """With a column for groups if there is a point of one."""
    sizes, has_groups = _sizes(journal), any(point.group for point in points)
    rows = [["point", "time", "size", *(["group"] if has_groups else []), "name"]]
    for point in points:
        size = size_text(sizes[point.sequence]) if point.sequence in sizes else "image"
        group = [str(point.group or "-")] if has_groups else []
        name = visible(point.name)
        rows.append([str(point.sequence), wall_time(point.time_ns), size, *group, name])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for number, at, *rest, name in rows:
        numbers = "  ".join(f"{one:>{width}}" for one, width in zip(rest, widths[2:], strict=True))
        line = f"{number:>{widths[0]}}  {at:{widths[1]}}  {numbers}  {name}"
        yield f"  {line.rstrip()}"


# nbdmirror recover


def _recover(args: argparse.Namespace) -> int:
    with opened_disks(_places(args), are_named=args.group) as disks:
        pairs = [
            {Side.IMAGE: image, Side.JOURNAL: journal}
            for image, journal in zip(disks[::2], disks[1::2], strict=True)
        ]
        if args.group:
            found = recover_group(
                pairs, wanted=args.point, now_ns=time.time_ns(), on_instant=_tell_of_group
            )
        else:
            found = [_recover_one(pairs[0], args.point)]
        for pair, one_found in zip(pairs, found, strict=True):
            print(_what_it_is(pair[Side.IMAGE], one_found))
    return DONE


def _places(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Image and journal, image and journal, each with its option. Raises CliError."""
    images, journals = args.image, args.journal
    if not args.group and max(len(images), len(journals)) > 1:
        option = "--image" if len(images) > 1 else "--journal"
        raise CliError(f"{option}: is given twice: several disks are recovered with --group", USAGE)
    if len(images) != len(journals):
        text = f"--image is given {len(images)} times, and --journal {len(journals)} times"
        raise CliError(f"--group: each image needs its journal: {text}", USAGE)
    if args.group and len(images) < 2:
        raise CliError("--group: needs images and journals of two disks at least", USAGE)
    pairs = zip(images, journals, strict=True)
    return [one for i, j in pairs for one in (("--image", i), ("--journal", j))]


def _recover_one(pair: Devices, wanted: str | None) -> Recovered:
    image, journal = pair[Side.IMAGE], pair[Side.JOURNAL]
    program = recover(
        journal.description,
        journal.size,
        image.size,
        wanted=wanted,
        now_ns=time.time_ns(),
        on_point=_tell,
    )
    return run(program, pair)


def _what_it_is(image: BlockDevice, found: Recovered) -> str:
    point = found.point
    name = f" ({visible(point.name)})" if point.name else ""
    text = f"point {point.sequence}{name} of {wall_time(point.time_ns)}"
    if found.was_done:  # what guests have done to it since is not known here
        at = wall_time(found.done_ns)
        return f"{image.description} was made {text} before, at {at}: nothing was changed now"
    return f"{image.description} is {text}"


def _tell_of_group(journals: Sequence[Journal], instant: Instant) -> None:
    say(f"recovering {len(instant)} disks at {wall_time(instant[0].time_ns)}")
    for journal, point in zip(journals, instant, strict=True):
        if journal.superblock.state is not State.PROMOTED:
            _tell(journal, point)


def _tell(journal: Journal, point: Point) -> None:
    for line in journal.damage:
        say(f"nbdmirror: warning: {journal.name}: {line}")
    size = sum(h.payload_bytes for h in journal.headers if h.point.sequence <= point.sequence)
    say(f"recovering point {point.sequence} of {wall_time(point.time_ns)}, {size_text(size)}")


@contextmanager
def opened_disks(
    places: Sequence[tuple[str, str]], *, are_named: bool = False
) -> Iterator[list[BlockDevice]]:
    """Several disks, each with its option. `are_named`: the option alone does not say which disk is
    meant. Raises CliError if two are the same, and as `_opened`."""
    places = [(option, _absolute(option, place)) for option, place in places]
    for (option, place), (other, second) in itertools.combinations(places, 2):
        if are_same(place, second):
            which = f" {place}: {second}" if are_named else ""
            raise CliError(f"{other}: names the same disk as {option}{which}")
    with ExitStack() as stack:
        disks = [stack.enter_context(_opened(*one)) for one in places]
        for one, other_disk in itertools.combinations(disks, 2):
            check_pair(raw_device(one), raw_device(other_disk))
        yield disks


def _absolute(option: str, place: str) -> str:
    return absolute_uri(place, f"{option}: ") if is_uri(place) else place


@contextmanager
def _opened(option: str, place: str, *, read_only: bool = False) -> Iterator[BlockDevice]:
    """A disk that is named by a path or an NBD URI. Raises CliError, which begins with `option`."""
    try:
        device = Attended(_open(option, place, read_only))
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
