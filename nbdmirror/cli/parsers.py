"""Arguments of further commands: the end of a job that waits for a user, bitmaps, and the list of
servers. Imports only argparse, as main.py does."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from nbdmirror.limits import DEADLINE_S_MAX, MAX_PAUSE_MS_MAX, PORT_MAX, whole_number

COPY_MODES = ("background", "write-blocking")
MAY = ("nothing", "throttle", "write-blocking", "throttle,write-blocking")
ON_DEADLINE = ("report", "cancel", "complete")
BITMAP_ACTIONS = ("list", "add", "remove", "clear", "enable", "disable", "merge")

Add = Callable[..., argparse.ArgumentParser]


def add_commands(
    add: Add,
    *,
    parse_size: Callable[[str], int],
    add_timeout: Callable[[argparse.ArgumentParser], None],
) -> list[argparse.ArgumentParser]:
    """Add the commands. Returns the parsers that take --device or --job."""
    copy_mode = add("copy-mode", "change whether the guest's writes wait for the target")
    copy_mode.add_argument(
        "mode",
        choices=(*COPY_MODES, "points"),
        help="background: they do not; write-blocking: they do, so that the mirror keeps up;"
        " points: they do not, and the far side has one moment of the disk",
    )
    _add_journal(copy_mode.add_argument)
    change = add("change", "change how a job may end")
    add_promises(change.add_argument, is_change=True)
    finalize = add("finalize", "end a pending job, one that was started with auto-finalize off")
    dismiss = add("dismiss", "remove an ended job, one that was started with auto-dismiss off")
    _add_bitmap(add("bitmap", "named dirty bitmaps of a disk"), parse_size)
    explain = add("explain", "explain what a job waits for, and whether it will end")
    explain.add_argument("--json", action="store_true", help="print JSON")
    servers = add("list", "list the servers of this host", qmp=False)
    servers.add_argument("--json", action="store_true", help="print JSON")
    _add_web(add("web", "show the servers of this host over HTTP", qmp=False))
    _add_points(add)
    point = add("point", "make a point of a disk now (copy mode points)")
    point.add_argument("--name", metavar="NAME", help="call the point NAME")
    point.add_argument("--wait", action="store_true", help="wait until the far side has the point")
    add_timeout(point)
    return [copy_mode, change, finalize, dismiss, explain, point]


def add_promises(add: Callable[..., object], *, is_change: bool = False) -> None:
    """Add the options about how a job may end to a command. `is_change`: the job has them."""

    def default(text: str) -> str:
        return "default: as it is" if is_change else f"default: {text}"

    text = "hold guests' writes for MS milliseconds at most at the pivot, 0: for a second"
    add("--max-pause", type=_max_pause, metavar="MS", help=f"{text} ({default('0')})")
    text = "if the job does not end without: nothing, throttle, write-blocking, or the last two"
    text += f" with a comma ({default('nothing')})"
    add("--may", choices=MAY, type=_may, metavar="WHAT", help=text)
    text = "the job is to have ended within TIME, from now on, 0: no deadline"
    add("--deadline", type=_deadline, metavar="TIME", help=f"{text} ({default('0')})")
    text = "what is done to a job that has not ended at its deadline"
    add("--on-deadline", choices=ON_DEADLINE, help=f"{text} ({default('report')})")


def _may(text: str) -> str:
    """One of MAY: its words in any order, with blanks or without."""
    words = {word.strip() for word in text.split(",")}
    found = ",".join(sorted(words))
    if found not in MAY:
        raise argparse.ArgumentTypeError(f"{text!r} is none of: {'; '.join(MAY)}")
    return found


def _max_pause(text: str) -> int:
    if (number := whole_number(text, 0, MAX_PAUSE_MS_MAX)) is None:
        raise argparse.ArgumentTypeError(f"not a whole number from 0 to {MAX_PAUSE_MS_MAX}: {text}")
    return number


def _deadline(text: str) -> float:
    if (seconds := duration(text)) > DEADLINE_S_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {DEADLINE_S_MAX // 86400} days")
    return seconds


def duration(text: str) -> float:
    """Seconds: a number with an optional unit."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d|)", text)
    if not match:
        text = f"{text!r} is not a time (examples: 0.5, 500ms, 1s, 5m, 2h, 7d)"
        raise argparse.ArgumentTypeError(text)
    number, unit = match.groups()
    return float(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}[unit]


def add_points_of_mirror(add: Callable[..., object]) -> None:
    """The options of `nbdmirror mirror` for points."""
    text = "points are snapshots of the target, which: nbdmirror points --exec makes (copy mode"
    add("--snapshots", action="store_true", help=f"{text} points)")
    _add_journal(add)


def _add_journal(add: Callable[..., object]) -> None:
    text = "write points to this export, an empty one (copy mode points)"
    add("--journal", metavar="URI", help=text)
    text = "with points: time from one point to the next (default: 1s)"
    add("--every", type=duration, metavar="TIME", help=text)
    text = "with --journal: keep points for so long, and recover any of them (default: 0)"
    add("--keep", type=duration, metavar="TIME", help=text)
    text = "with points: an event reports a lag of more than this, and its end"
    add("--rpo", type=duration, metavar="TIME", help=text)
    text = "with --journal: what to do if not even one point fits into it (default: stop)"
    add("--on-journal-full", choices=("stop", "in-place"), help=text)


POINT = "its number, its name, or a time in ISO 8601: the last point that is not later"
POINT += " (default: the newest)"


def add_point(serve: argparse.ArgumentParser) -> None:
    """Options of `serve` for a point of a journal."""
    add = serve.add_argument
    journal = "the disk is the image of this journal: serve a point of it; with --read-only beside"
    journal += " a source that continues, else instead of that source"
    add("--journal", metavar="DISK", help=journal)
    add("--point", metavar="POINT", help=f"with --journal: {POINT}")


def _add_points(add: Add) -> None:
    disk = "an NBD URI, a raw file or a block device"
    points = add("points", "list the points of a journal, or run a command at each point")
    points.usage = "nbdmirror points JOURNAL [--json]\n       nbdmirror points --exec COMMAND"
    points.usage += " [--device NAME|--job ID] [--qmp PATH]"
    points.add_argument("journal_uri", metavar="JOURNAL", nargs="?", help=f"the journal: {disk}")
    points.add_argument("--json", action="store_true", help="print JSON")
    text = "make a snapshot of the target with this shell command, at each point of a running job"
    points.add_argument("--exec", metavar="COMMAND", help=text)
    which = points.add_mutually_exclusive_group()
    which.add_argument("--device", metavar="NAME", help="choose the job of this disk")
    which.add_argument("--job", metavar="ID", help="the job (default: the only one)")
    recover = add("recover", "make an image a point of its journal", qmp=False)
    text = "several disks of one guest: --image and --journal of each in turn; all images are made"
    text += " the newest moment that all journals have"
    recover.add_argument("--group", action="store_true", help=text)
    for option, what in (("--image", f"the image: {disk}"), ("--journal", "its journal")):
        add_disk = recover.add_argument
        add_disk(option, metavar="DISK", required=True, action="append", help=what)
    text = f"{POINT}; with --group no number"
    recover.add_argument("--point", metavar="POINT", help=text)


def check_points(args: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """The two forms of `nbdmirror points`."""
    if (args.journal_uri is None) is (args.exec is None):
        error("points: give either JOURNAL, to list its points, or --exec COMMAND")
    options = {"--json": args.json} if args.exec is not None else {}
    if args.exec is None:
        options = {"--qmp": args.qmp, "--device": args.device, "--job": args.job}
    for option, value in options.items():
        if value:
            error(f"{option}: not allowed with {'--exec' if args.exec is not None else 'JOURNAL'}")


def _add_bitmap(bitmap: argparse.ArgumentParser, parse_size: Callable[[str], int]) -> None:
    bitmap.usage = (
        "nbdmirror bitmap ACTION [NAME] [FROM ...] [--device NAME] [--granularity SIZE]"
        " [--persistent] [--disabled] [--json] [--qmp PATH]"
    )
    add = bitmap.add_argument
    add("action", metavar="ACTION", choices=BITMAP_ACTIONS, help=", ".join(BITMAP_ACTIONS))
    names = "the bitmap; merge: the destination, then the sources"
    add("names", metavar="NAME", nargs="*", help=names)
    add("--device", metavar="NAME", help="the disk (default: the only one; list: all)")
    add("--granularity", type=parse_size, metavar="SIZE", help="add: bytes a bit (default: 64K)")
    add("--persistent", action="store_true", help="add: keep the bitmap across restarts")
    add("--disabled", action="store_true", help="add: do not record yet")
    add("--json", action="store_true", help="list: print JSON")


def _add_web(web: argparse.ArgumentParser) -> None:
    sockets = "a control socket, or a directory of such (default: those that list finds)"
    web.add_argument("sockets", metavar="SOCKET", nargs="*", help=sockets)
    where = "listen there (default: 127.0.0.1:10810)"
    default = ("127.0.0.1", 10810)
    web.add_argument("--listen", type=_address, metavar="HOST:PORT", default=default, help=where)


def _address(text: str) -> tuple[str, int]:
    """A host and a port; an IPv6 address is in brackets."""
    match = re.fullmatch(r"(\[([0-9a-fA-F:.%\w]+)\]|([^][:/\s]+)):(.*)", text)
    if not match:
        examples = "127.0.0.1:10810, localhost:10810, [::1]:10810"
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT (examples: {examples})")
    if (port := whole_number(match[4], 1, PORT_MAX)) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: the port is not a number from 1 to {PORT_MAX}")
    return match[2] or match[3], port
