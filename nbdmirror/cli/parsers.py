"""Arguments of further commands: the end of a job that waits for a user, bitmaps, and the list of
servers. Imports only argparse, as main.py does."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from nbdmirror.limits import PORT_MAX, whole_number

COPY_MODES = ("background", "write-blocking")
BITMAP_ACTIONS = ("list", "add", "remove", "clear", "enable", "disable", "merge")

Add = Callable[..., argparse.ArgumentParser]


def add_commands(add: Add, *, parse_size: Callable[[str], int]) -> list[argparse.ArgumentParser]:
    """Add the commands. Returns the parsers that take --device or --job."""
    copy_mode = add("copy-mode", "change whether the guest's writes wait for the target")
    copy_mode.add_argument(
        "mode",
        choices=COPY_MODES,
        help="background: they do not; write-blocking: they do, so that the mirror keeps up",
    )
    finalize = add("finalize", "end a pending job, one that was started with auto-finalize off")
    dismiss = add("dismiss", "remove an ended job, one that was started with auto-dismiss off")
    _add_bitmap(add("bitmap", "named dirty bitmaps of a disk"), parse_size)
    servers = add("list", "list the servers of this host", qmp=False)
    servers.add_argument("--json", action="store_true", help="print JSON")
    _add_web(add("web", "show the servers of this host over HTTP", qmp=False))
    return [copy_mode, finalize, dismiss]


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
