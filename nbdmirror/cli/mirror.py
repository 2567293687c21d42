"""`nbdmirror mirror`: starts to mirror a disk, or several disks that belong together."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nbdmirror.cli import point as cli_point
from nbdmirror.cli import words as cli_words
from nbdmirror.cli.common import DONE, USAGE, CliError, absolute_uri
from nbdmirror.cli.jobs import Watch, disk_names, only_disk
from nbdmirror.cli.progress import PlainDisplay, open_display
from nbdmirror.cli.session import REPLY_S_MAX, Session, as_arguments
from nbdmirror.cli.together import Sessions, apart, each
from nbdmirror.identity import Same, same_place
from nbdmirror.names import default_job_id, split_disk
from nbdmirror.partial_target import is_partial, target_text

CONNECTS = 4
"""A mirror's start connects to the target, perhaps to its old side's second export, and to a
journal likewise."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a disk is mirrored to."""

    device: str
    """The disk's name; "": the only disk."""
    target: str
    journal: str | None


def check(args: argparse.Namespace) -> None:
    """Set `args.places`. Raises CliError if the arguments contradict one another."""
    cli_point.check(args)
    targets = [_split(text, "TARGET_URI", "target") for text in args.targets]
    names = [name for name, _ in targets]
    if args.device and any(names):
        raise CliError("--device: the disk is named with its target: give one of the two", USAGE)
    if len(targets) > 1:
        _check_names(args, targets)
    uris = [absolute_uri(uri) for _, uri in targets]
    journals = _journals(args.journal, names)
    if len(targets) > 1:
        _check_apart([("TARGET_URI", uri) for uri in uris], journals)
    args.places = [
        Place(name or args.device or "", uri, journal)
        for name, uri, journal in zip(names, uris, journals, strict=True)
    ]


def _split(text: str, option: str, what: str) -> tuple[str, str]:
    """The name, or "", and the URI of a [NAME=]URI."""
    name, uri = split_disk(text)
    if not uri:
        raise CliError(f"{option}: disk {name} is given no {what}", USAGE)
    return name, uri


def _check_names(args: argparse.Namespace, targets: Sequence[tuple[str, str]]) -> None:
    seen: set[str] = set()
    for name, uri in targets:
        if not name:
            text = f"TARGET_URI: {uri}: there are {len(targets)} targets: name the disk of each"
            raise CliError(f"{text}: NAME=TARGET_URI", USAGE)
        if name in seen:
            raise CliError(f"TARGET_URI: disk {name} is given two targets", USAGE)
        seen.add(name)
    if args.job:
        text = f"names one job, and there are {len(targets)}: each has the name of its disk"
        raise CliError(f"--job: {text}", USAGE)


def _journals(given: Sequence[str] | None, names: Sequence[str]) -> list[str | None]:
    """The journal of each disk. `names`: of the disks, in the order of their targets."""
    if given is None:
        return [None for _ in names]
    found = [_split(text, "--journal", "journal") for text in given]
    uris = [absolute_uri(uri, "--journal: ") for _, uri in found]
    if len(found) != len(names):
        given_are = f"{_count(len(names), 'disk')} and {_count(len(found), 'journal')} are given"
        raise CliError(f"--journal: each disk needs a journal of its own: {given_are}", USAGE)
    by_name = {name: uri for (name, _), uri in zip(found, uris, strict=True) if name}
    if not by_name:
        return [*uris]
    for name, uri in zip((name for name, _ in found), uris, strict=True):
        if not name:
            text = f"--journal: {uri}: others are named: name the disk of each: NAME=URI"
            raise CliError(text, USAGE)
        if name not in names:
            raise CliError(f"--journal: disk {name} is given no target: NAME=TARGET_URI", USAGE)
    if len(by_name) < len(found):
        raise CliError("--journal: a disk is given two journals", USAGE)
    return [by_name[name] for name in names]


def _check_apart(targets: list[tuple[str, str]], journals: Sequence[str | None]) -> None:
    """No export may be named twice: of two connections its server may keep one waiting."""
    places = targets + [("--journal", uri) for uri in journals if uri is not None]
    for (option, place), (other, second) in itertools.combinations(places, 2):
        if same_place(place, second) is Same.YES:
            raise CliError(f"{other}: {second}: is the same export as {option} {place}", USAGE)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def arguments(args: argparse.Namespace, place: Place, device: str) -> dict[str, Any]:
    """Those of drive-mirror; None: not given."""
    return {
        "device": device,
        "target": place.target,
        "mode": "existing",
        "sync": args.sync,
        "job_id": args.job,
        "copy_mode": "points" if args.journal or args.snapshots else args.copy_mode,
        **cli_point.options(args, place.journal),
        "granularity": args.granularity,
        "buf_size": args.buf_size,
        "speed": args.speed,
        "x_nbdmirror_open_timeout": args.open_timeout,
        "x_nbdmirror_reconnect_delay": args.reconnect_delay,
        "on_source_error": args.on_source_error,
        "on_target_error": args.on_target_error,
        **promises(args),
        "bitmap": args.bitmap,
        "unmap": False if args.no_unmap else None,
        "target_is_zero": args.target_is_zero or None,
        "x_nbdmirror_target_cluster_size": args.target_cluster_size,
        "x_nbdmirror_allow_larger_target": args.allow_larger_target or None,
    }


def promises(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments about how a job may end; None: not given."""
    may = None if args.may is None else [word for word in args.may.split(",") if word != "nothing"]
    return {
        "x_nbdmirror_max_pause": args.max_pause,
        "x_nbdmirror_may": may,
        "x_nbdmirror_deadline": args.deadline,
        "x_nbdmirror_on_deadline": args.on_deadline,
    }


async def run(session: Session, args: argparse.Namespace) -> int:
    places: list[Place] = args.places
    if len(places) == 1 and not places[0].device:
        devices = [await only_disk(session)]
    else:
        devices = [place.device for place in places]
    disks = await disk_names(session)
    jobs = [args.job or default_job_id(device, disks) for device in devices]
    asked = [arguments(args, *one) for one in zip(places, devices, strict=True)]
    session.events.clear()  # drop events of an earlier job with this name
    sessions = apart(session, jobs)
    for job, one in sessions.items():
        one.job = job
    session.is_starting = True
    limit_s = len(places) * (REPLY_S_MAX + CONNECTS * (args.open_timeout or 0))
    if len(places) == 1:
        await session.execute("drive-mirror", limit_s=limit_s, **asked[0])
    else:
        actions = [{"type": "drive-mirror", "data": as_arguments(**one)} for one in asked]
        how = {"completion-mode": "grouped"}
        await session.execute("transaction", limit_s=limit_s, actions=actions, properties=how)
    session.is_starting = False
    if not args.wait:
        targets = [place.target for place in places]
        return await _tell(sessions, targets, devices, has_journals=bool(args.journal))
    return await each(sessions, partial(_wait, args))


async def _tell(
    sessions: Sessions, targets: Sequence[str], devices: Sequence[str], *, has_journals: bool
) -> int:
    """An immediate failure is known by now. It ends all jobs."""
    watches = {job: Watch(one, job, PlainDisplay(time.monotonic)) for job, one in sessions.items()}
    states = {job: await watch.look() for job, watch in watches.items()}
    if any(watches[job].end or not state for job, state in states.items()):

        async def follow(_: Session, job: str) -> int:
            await watches[job].until(ready=False)
            return await watches[job].report(verb="mirror")

        return await each(sessions, follow)
    for (job, state), device, target in zip(states.items(), devices, targets, strict=True):
        assert state is not None
        sync = state.get("sync", "full")
        left = [f"at its end the target {target_text(sync)}"] if is_partial(sync) else []
        text = "; ".join([cli_words.state(state), *cli_words.deadline(state), *left])
        print(f"job {job} mirrors {device} to {target}: {text}; see: nbdmirror status")
    if has_journals:
        await asyncio.gather(*(cli_point.tell_of_outage(one, job) for job, one in sessions.items()))
    return DONE


async def _wait(args: argparse.Namespace, session: Session, job: str) -> int:
    if args.journal and not args.json:
        await cli_point.tell_of_outage(session, job)
    is_alone = len(args.places) == 1
    with open_display(time.monotonic, as_json=args.json, is_alone=is_alone) as display:
        watch = Watch(session, job, display)
        await watch.until(ready=True)
        verb = "mirror"
        if args.wait == "completed" and not watch.end:
            verb = "complete"
            await session.execute("job-complete", id=job)
            await watch.until(ready=False)
    return await watch.report(verb=verb)
