"""`nbdmirror point`: a running job makes a point now. And the options of a mirror with points."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from nbdmirror.cli.common import DONE, USAGE, CliError
from nbdmirror.cli.jobs import find_job
from nbdmirror.cli.session import Session, jobs_of
from nbdmirror.cli.streams import say
from nbdmirror.point_sentences import outage

OUTAGE_S_MAX = 3.0
"""How long a command waits until it is known how much guests change."""

POLL_S = 0.25


async def tell_of_outage(session: Session, job: str) -> None:
    """Say for how long the journal of a job that has just begun will do, once that is known."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + OUTAGE_S_MAX
    while loop.time() < end_s:
        points = (jobs_of(await session.status()).get(job) or {}).get("x-nbdmirror-points") or {}
        if text := outage(points):
            say(f"the journal of job {job}: {text}")
        if text or not points:
            return
        await asyncio.sleep(POLL_S)


async def run(session: Session, args: argparse.Namespace) -> int:
    job = session.job = await find_job(session, args)
    point = await session.execute(
        "x-nbdmirror-point",
        limit_s=None,  # the server has one for the moment; --timeout, for the rest
        id=job,
        name=args.name,
        wait=args.wait or None,
    )
    what = f"point {point['sequence']}" + (f" ({args.name})" if args.name else "")
    if args.wait:
        print(f"job {job}: the far side has {what}")
    else:
        print(f"job {job}: {what} is taken, and on its way to the far side")
    return DONE


def check(args: argparse.Namespace) -> None:
    """Raise CliError if the options of a mirror contradict one another."""
    given = [f"--{name}" for name in ("journal", "snapshots") if getattr(args, name)]
    if len(given) > 1:
        text = "--snapshots: points are in the journal, or are snapshots: give one of both"
        raise CliError(text, USAGE)
    if given and args.copy_mode:
        text = f"--copy-mode: {given[0]} has a copy mode of its own: give one of the two"
        raise CliError(text, USAGE)


def check_change(args: argparse.Namespace) -> None:
    """Raise CliError if the options of `nbdmirror copy-mode` contradict one another."""
    if args.mode == "points":
        if not args.journal:
            raise CliError("points: needs --journal", USAGE)
        return
    for name, value in options_of_journal(args, args.journal).items():
        if value is not None:
            option = _OPTIONS[name]
            raise CliError(f"{option}: needs the copy mode points", USAGE)


_OPTIONS = {
    "x_nbdmirror_journal": "--journal",
    "x_nbdmirror_interval": "--every",
    "x_nbdmirror_keep": "--keep",
    "x_nbdmirror_rpo": "--rpo",
    "x_nbdmirror_on_journal_full": "--on-journal-full",
}


def options(args: argparse.Namespace, journal: str | None) -> dict[str, Any]:
    """The arguments of a mirror with points; None: not given."""
    snapshots = {"x_nbdmirror_auto_point": False if args.snapshots else None}
    return options_of_journal(args, journal) | snapshots


def options_of_journal(args: argparse.Namespace, journal: str | None) -> dict[str, Any]:
    """Those of points in a journal; None: not given."""
    return {
        "x_nbdmirror_journal": journal,
        "x_nbdmirror_interval": args.every,
        "x_nbdmirror_keep": args.keep,
        "x_nbdmirror_rpo": args.rpo,
        "x_nbdmirror_on_journal_full": args.on_journal_full,
    }
