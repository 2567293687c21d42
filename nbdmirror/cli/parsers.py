"""Arguments of the commands beyond the mirror itself: how a job is ended that waits for somebody,
bitmaps, and which servers there are. Imports nothing but argparse, as main.py does."""

from __future__ import annotations

import argparse
from collections.abc import Callable

COPY_MODES = ("background", "write-blocking")
BITMAP_ACTIONS = ("list", "add", "remove", "clear", "enable", "disable", "merge")

Add = Callable[..., argparse.ArgumentParser]


def add_commands(add: Add, *, parse_size: Callable[[str], int]) -> list[argparse.ArgumentParser]:
    """Returns those that take --device or --job."""
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
    return [copy_mode, finalize, dismiss]


def _add_bitmap(bitmap: argparse.ArgumentParser, parse_size: Callable[[str], int]) -> None:
    bitmap.usage = (
        "nbdmirror bitmap ACTION [NAME] [FROM ...] [--device NAME] [--granularity SIZE]"
        " [--persistent] [--disabled] [--json] [--qmp PATH]"
    )
    add = bitmap.add_argument
    add("action", metavar="ACTION", choices=BITMAP_ACTIONS, help=", ".join(BITMAP_ACTIONS))
    names = "the bitmap; for merge, those that are added to it"
    add("names", metavar="NAME", nargs="*", help=names)
    add("--device", metavar="NAME", help="the disk (default: the only one; list: all)")
    add("--granularity", type=parse_size, metavar="SIZE", help="add: bytes a bit (default: 64K)")
    add("--persistent", action="store_true", help="add: keep the bitmap across restarts")
    add("--disabled", action="store_true", help="add: do not record yet")
    add("--json", action="store_true", help="list: print JSON")
