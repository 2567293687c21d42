"""Arguments of commands: a mirror, the end of a job that waits for a user, bitmaps, points, and the
list of servers. Imports only argparse, as main.py does."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from nbdmirror.cli.values import duration, parse_size, rate, seconds, whole
from nbdmirror.limits import (
    DEADLINE_S_MAX,
    MAX_PAUSE_MS_MAX,
    PORT_MAX,
    RECONNECT_DELAY_S_MAX,
    TARGET_TIMEOUT_S_MAX,
    whole_number,
)

COPY_MODES = ("background", "write-blocking")
MAY = ("nothing", "throttle", "write-blocking", "throttle,write-blocking")
ON_DEADLINE = ("report", "cancel", "complete")
POLICIES = ("report", "ignore", "enospc", "stop", "auto")
SYNC_MODES = ("full", "top", "none", "incremental", "bitmap")
BITMAP_ACTIONS = ("list", "add", "remove", "clear", "enable", "disable", "merge")

Add = Callable[..., argparse.ArgumentParser]


def add_job(command: argparse.ArgumentParser, *, is_several: bool = False) -> None:
    """Which job a command is about. `is_several`: or which jobs."""
    which = command.add_mutually_exclusive_group()
    action, more = ("append", "; may be repeated") if is_several else ("store", "")
    disk, job = f"choose the job of this disk{more}", f"the job (default: the only one){more}"
    which.add_argument("--device", metavar="NAME", action=action, help=disk)
    which.add_argument("--job", metavar="ID", action=action, help=job)


def add_timeout(command: argparse.ArgumentParser) -> None:
    text = "stop waiting after S seconds; the job continues (default: no limit)"
    command.add_argument("--timeout", type=seconds, metavar="S", help=text)


def add_commands(add: Add) -> list[argparse.ArgumentParser]:
    """Add the commands. Returns the parsers that take --device or --job."""
    copy_mode = add("copy-mode", "change whether the guest's writes wait for the target")
    copy_mode.add_argument(
        "mode",
        choices=(*COPY_MODES, "points"),
        help="background: they do not; write-blocking: they do, so that the mirror keeps up;"
        " points: they do not, and the far side has one moment of the disk",
    )
    text = "write points to this export, an empty one (copy mode points)"
    _add_journal(copy_mode.add_argument, text, metavar="URI")
    change = add("change", "change how a job may end")
    add_promises(change.add_argument, is_change=True)
    finalize = add("finalize", "end a pending job, one that was started with auto-finalize off")
    dismiss = add("dismiss", "remove an ended job, one that was started with auto-dismiss off")
    _add_bitmap(add("bitmap", "named dirty bitmaps of a disk"))
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


def add_mirror(mirror: argparse.ArgumentParser) -> None:
    mirror.usage = "nbdmirror mirror TARGET_URI|NAME=TARGET_URI ... [options]"
    add = mirror.add_argument
    text = "NBD URI of the target, of the disk's size; with several disks NAME=TARGET_URI for each:"
    text += " their jobs end together, and their points are of the same moments"
    add("targets", metavar="[NAME=]TARGET_URI", nargs="+", help=text)
    add("--device", metavar="NAME", help="the disk to mirror (default: the only one)")
    add("--sync", choices=SYNC_MODES, default="full", help="what to copy (default: %(default)s)")
    mode = "write-blocking: the guest's writes wait for the target (default: background)"
    add("--copy-mode", choices=COPY_MODES, help=mode)
    text = "points are snapshots of the target, which: nbdmirror points --exec makes (copy mode"
    add("--snapshots", action="store_true", help=f"{text} points)")
    _add_journal(
        add,
        "write points to this export, an empty one (copy mode points); with several"
        " disks one for each",
        metavar="[NAME=]URI",
        action="append",
    )
    add("--granularity", type=parse_size, metavar="SIZE", help="unit of the dirty bitmap")
    add("--buf-size", type=parse_size, metavar="SIZE", help="bytes in flight at most")
    add("--speed", type=rate, metavar="RATE", help="bytes per second; 0: no limit")
    text = "seconds for the target's server to answer, at each connect (default: 10)"
    add("--open-timeout", type=whole(1, TARGET_TIMEOUT_S_MAX), metavar="S", help=text)
    delay = "seconds to wait for a lost target before an error is reported"
    add("--reconnect-delay", type=whole(0, RECONNECT_DELAY_S_MAX), metavar="S", help=delay)
    for side in ("source", "target"):
        policy = f"what to do if the {side} fails (default: report, which ends the job)"
        add(f"--on-{side}-error", choices=POLICIES, help=policy)
    add("--bitmap", metavar="NAME", help="for --sync bitmap or incremental")
    cluster = "cluster size of a target whose backing file is attached later"
    add("--target-cluster-size", type=parse_size, metavar="SIZE", help=cluster)
    add("--no-unmap", action="store_true", help="write zeroes rather than trim the target")
    zero = "assume that the target reads as zeroes (not checked)"
    add("--target-is-zero", action="store_true", help=zero)
    larger = "allow a larger target; what lies past the disk's end is not written"
    add("--allow-larger-target", action="store_true", help=larger)
    add("--job", metavar="ID", help="a name for the job (default: the disk's)")
    add_promises(add)
    wait = "wait until then; completed: complete the job when it is ready"
    add("--wait", choices=("ready", "completed"), help=wait)
    add("--json", action="store_true", help="with --wait: print JSON lines")
    add_timeout(mirror)


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
    if (found := duration(text)) > DEADLINE_S_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {DEADLINE_S_MAX // 86400} days")
    return found


def _add_journal(add: Callable[..., object], text: str, **journal: str) -> None:
    add("--journal", help=text, **journal)
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
    text = "make an image the points of its journal, beside a source that continues"
    apply = add("apply", text, qmp=False)
    for option, what in (("--image", f"the image: {disk}"), ("--journal", "its journal")):
        apply.add_argument(option, metavar="DISK", required=True, help=what)


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


def _add_bitmap(bitmap: argparse.ArgumentParser) -> None:
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
