"""`nbdmirror bitmap`: named dirty bitmaps of a disk."""

from __future__ import annotations

import argparse
import json
from typing import Any

from nbdmirror.cli.common import DONE, USAGE, CliError
from nbdmirror.cli.jobs import only_disk
from nbdmirror.cli.session import Session
from nbdmirror.cli.words import size

ONLY_OF_ADD = ("granularity", "persistent", "disabled")


async def run(session: Session, args: argparse.Namespace) -> int:
    _check(args)
    if args.action == "list":
        return await _list(session, args)
    disk = args.device or await only_disk(session)
    name = args.names[0]
    if args.action == "merge":
        await session.execute(
            "block-dirty-bitmap-merge", node=disk, target=name, bitmaps=args.names[1:]
        )
    else:
        await session.execute(
            f"block-dirty-bitmap-{args.action}",
            node=disk,
            name=name,
            granularity=args.granularity,
            persistent=args.persistent or None,
            disabled=args.disabled or None,
        )
    found = [bitmap for bitmap in await _bitmaps(session, disk) if bitmap["name"] == name]
    print("\n".join(map(_text, found)) or f"disk {disk} has no bitmap {name} any more")
    return DONE


def _check(args: argparse.Namespace) -> None:
    """Check what the parser cannot check. Raises CliError."""
    wanted = {"list": "no NAME", "merge": "NAME and one or more FROM"}.get(args.action, "one NAME")
    count = len(args.names)
    fits = {"list": count == 0, "merge": count >= 2}.get(args.action, count == 1)
    if not fits:
        raise CliError(f"bitmap {args.action}: expects {wanted}", USAGE)
    for option in ONLY_OF_ADD:
        if getattr(args, option) and args.action != "add":
            raise CliError(f"bitmap {args.action}: --{option} is for add only", USAGE)
    if args.json and args.action != "list":
        raise CliError(f"bitmap {args.action}: --json is for list only", USAGE)


async def _list(session: Session, args: argparse.Namespace) -> int:
    disks = (await session.status()).get("disks", [])
    names = [args.device] if args.device else [disk["name"] for disk in disks]
    found = {name: await _bitmaps(session, name) for name in names}
    if args.json:
        print(json.dumps(found, indent=2))
        return DONE
    for name, bitmaps in found.items():
        lines = [f"  {_text(bitmap)}" for bitmap in bitmaps]
        print("\n".join([name, *lines]) if lines else f"{name}  no bitmaps")
    return DONE


async def _bitmaps(session: Session, disk: str) -> list[dict[str, Any]]:
    disks = (await session.status()).get("disks", [])
    for one in disks:
        if one.get("name") == disk:
            return list(one.get("bitmaps", []))
    names = ", ".join(str(one.get("name")) for one in disks)
    raise CliError(f"there is no disk {disk}; the server's disks are: {names}")


def _text(bitmap: dict[str, Any]) -> str:
    parts = [f"{bitmap['name']}: {size(bitmap['count'])} dirty"]
    parts.append(f"granularity {size(bitmap['granularity'])}")
    parts.append("recording" if bitmap.get("recording") else "disabled")
    parts += [word for word in ("persistent", "busy") if bitmap.get(word)]
    return ", ".join(parts)
