"""The commands that send QMP to a running server, except `handover`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import Any

from qemu.qmp import QMPError

from nbdmirror.cli import bitmaps as cli_bitmaps
from nbdmirror.cli import explain as cli_explain
from nbdmirror.cli import mirror as cli_mirror
from nbdmirror.cli import point as cli_point
from nbdmirror.cli import status as cli_status
from nbdmirror.cli import watch as cli_watch
from nbdmirror.cli import words as cli_words
from nbdmirror.cli.common import DONE, FAILED, INTERRUPTED, TIMED_OUT, USAGE, CliError
from nbdmirror.cli.jobs import NoJob, Watch, find_job, find_jobs, last_jobs, one_by_one
from nbdmirror.cli.progress import JsonDisplay, Meter, PlainDisplay, open_display
from nbdmirror.cli.session import (
    Job,
    Session,
    connect,
    forget_interrupt,
    jobs_of,
    run_interruptible,
    server_path,
)
from nbdmirror.cli.together import apart, each

PAUSE_S_MAX = 10.0
"""A pause takes effect when the requests in flight have ended: within seconds, if their servers
answer."""
RESUME_S_MAX = 5.0
"""How long to wait for the first progress of a resumed job."""
OUTLOOK_S_MAX = 2.0
"""How long a last query of a job may take when its command stops waiting."""

Step = tuple[str, dict[str, Any]]
"""A command, and its arguments."""


def run(args: argparse.Namespace) -> int:
    if getattr(args, "watch", False):
        command = cli_watch.watch(args.json, server_path(args))
        return run_interruptible(command, [signal.SIGINT])  # the others have nothing to tell
    return run_interruptible(_run(args))


async def _run(args: argparse.Namespace) -> int:
    limit_s = getattr(args, "timeout", None)
    path, patience_s = server_path(args), math.inf if limit_s is None else limit_s
    async with connect(path, limit_s=patience_s) as session:
        try:
            async with asyncio.timeout(limit_s):
                return await _COMMANDS[args.command](session, args)
        except TimeoutError as error:
            text = f"timed out after {args.timeout:g} s; {await _outlook(session)}"
            raise CliError(text, TIMED_OUT) from error
        except asyncio.CancelledError:
            if not session.watched:
                raise
            forget_interrupt()
            raise CliError(f"interrupted; {await _outlook(session)}", INTERRUPTED) from None


async def _outlook(session: Session) -> str:
    """What the jobs are about to do, by a last query, when the command stops waiting for them. In
    another conversation: a server answers the commands of one client one after the other."""
    jobs = session.watched
    if not jobs:
        return "jobs on the server continue"
    try:
        async with asyncio.timeout(OUTLOOK_S_MAX), connect(session.path) as other:
            status = await other.status()
    except (CliError, QMPError, TimeoutError):
        what = "state of job {} is" if len(jobs) == 1 else "states of jobs {} are"
        return f"the {what.format(', '.join(jobs))} not known; see: nbdmirror status"
    parts: list[str] = []
    found = {job: jobs_of(status).get(job) for job in jobs}
    for job, state in found.items():
        parts += _outlook_of(job, state, is_starting=session.is_starting)
    if any(state is not None for state in found.values()):
        parts += cli_words.server_troubles(status)
    if any(state.get("ending", "none") != "none" for state in found.values() if state):
        parts.append("stop that with: nbdmirror cancel --force")
    return "; ".join(parts)


def _outlook_of(job: str, state: Job | None, *, is_starting: bool) -> list[str]:
    if state is not None:
        remarks = [remark.text for remark in cli_words.remarks(state)]
        return [f"job {Meter(time.monotonic).update(state)}", *remarks]
    what = "may still start" if is_starting else "has ended"
    return [f"job {job} {what}; see: nbdmirror status"]


# Waiting


async def _wait(session: Session, args: argparse.Namespace) -> int:
    wanted = one_by_one(args)

    async def follow(one: Session, name: str) -> int:
        try:
            job = await find_job(one, wanted[name])
        except NoJob as error:
            return await _report_last(one, wanted[name], str(error), as_json=args.json)
        is_alone = len(wanted) == 1
        with open_display(time.monotonic, as_json=args.json, is_alone=is_alone) as display:
            watch = Watch(one, job, display)
            await watch.until(ready=args.ready)
        return await watch.report(verb="wait")

    return await each(apart(session, [*wanted]), follow)


async def _report_last(
    session: Session, wanted: argparse.Namespace, what: str, *, as_json: bool
) -> int:
    """There is no job: report how the last matching job ended."""
    lasts = last_jobs(await session.status(), wanted)
    if len(lasts) != 1:
        raise CliError(what)
    kind = JsonDisplay if as_json else PlainDisplay
    watch = Watch(session, str(lasts[0]["id"]), kind(time.monotonic))
    return await watch.report(verb="wait")


async def _complete(session: Session, args: argparse.Namespace) -> int:
    jobs = await find_jobs(session, args)
    steps = [("job-complete", {"id": job}) for job in jobs]
    return await _end(session, jobs, steps, verb="complete")


async def _cancel(session: Session, args: argparse.Namespace) -> int:
    jobs = await find_jobs(session, args)
    states = await session.jobs()
    for job in jobs:
        state = states.get(job, {})
        if (state.get("status"), state.get("ending"), args.force) == ("ready", "complete", False):
            raise CliError(
                f"job {job} is already being completed, and only a forced cancel stops that:"
                " nbdmirror cancel --force (the target is left unusable)"
            )
    steps: list[Step] = [("block-job-cancel", {"device": job}) for job in jobs]
    if args.force and len(jobs) == 1:
        steps = [("job-cancel", {"id": jobs[0]})]  # which has no soft cancel
    elif args.force:
        steps = [(name, {**arguments, "force": True}) for name, arguments in steps]
    return await _end(session, jobs, steps, verb="cancel")


async def _end(session: Session, jobs: list[str], steps: Sequence[Step], *, verb: str) -> int:
    """End `jobs` with `steps`, all or none, and watch them until they have ended."""
    sessions = apart(session, jobs)
    followed: dict[str, tuple[Watch, ExitStack]] = {}

    async def follow(_: Session, job: str) -> int:
        watch, shown = followed[job]
        with shown:
            await watch.until(ready=False)
        return await watch.report(verb=verb)

    with ExitStack() as all_shown:
        for job, one in sessions.items():
            shown = all_shown.enter_context(ExitStack())
            display = open_display(time.monotonic, is_alone=len(jobs) == 1)
            watch = Watch(one, job, shown.enter_context(display))
            await watch.look()
            followed[job] = watch, shown
        await _all_or_none(session, steps)
        return await each(sessions, follow)


async def _finalize(session: Session, args: argparse.Namespace) -> int:
    job = await find_job(session, args)
    return await _end(session, [job], [("job-finalize", {"id": job})], verb="finalize")


async def _all_or_none(session: Session, steps: Sequence[Step]) -> None:
    if len(steps) == 1:
        name, arguments = steps[0]
        await session.execute(name, **arguments)
    else:
        actions = [{"type": name, "data": arguments} for name, arguments in steps]
        await session.execute("transaction", actions=actions)


# The small ones


async def _pause(session: Session, args: argparse.Namespace) -> int:
    job = await find_job(session, args)
    watch = Watch(session, job, PlainDisplay(time.monotonic))
    before = await watch.look() or {}
    watch.check_not_ended()
    if cli_words.state(before) != "pausing":  # else only wait
        await session.execute("job-pause", id=job)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PAUSE_S_MAX):
            while (state := await watch.look()) and not _is_paused(state):
                await watch.news()
    state = await watch.look()
    if watch.end or not state:
        return await watch.report(verb="pause")
    if not _is_paused(state):
        raise CliError(f"not yet: {await _outlook(session)}", TIMED_OUT)
    print(f"job {job} is paused; continue with: nbdmirror resume")
    return DONE


def _is_paused(job: Job) -> bool:
    return job.get("status") in ("paused", "standby")


async def _resume(session: Session, args: argparse.Namespace) -> int:
    """Resume, and wait until the job makes progress, or has stopped again."""
    job = await find_job(session, args)
    watch = Watch(session, job, PlainDisplay(time.monotonic))
    before = await watch.look() or {}
    watch.check_not_ended()
    await session.execute("job-resume", id=job)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RESUME_S_MAX):
            while (state := await watch.look()) and not _has_moved(state, before):
                await watch.news()
    state = await watch.look()
    if watch.end or not state:
        return await watch.report(verb="resume")
    if state.get("paused") and state.get("status") not in ("waiting", "pending"):
        reason = cli_words.last_error(state)
        raise CliError(f"job {job} has stopped again: {reason}", FAILED)
    if not _has_moved(state, before):
        raise CliError(f"resumed, but nothing was copied yet: {await _outlook(session)}", TIMED_OUT)
    print(f"job {job} continues: {cli_words.state(state)}")
    return DONE


def _has_moved(job: Job, before: Job) -> bool:
    """Whether the job has made progress, has nothing to do, or is paused."""
    if job.get("paused"):
        return True
    is_there = job.get("target-connected", True) and job.get("journal-connected", True)
    has_copied = job.get("offset", 0) > before.get("offset", 0)
    return is_there and (has_copied or job.get("len") == job.get("offset"))


async def _set_speed(session: Session, args: argparse.Namespace) -> int:
    job = await find_job(session, args)
    await session.execute("block-job-set-speed", device=job, speed=args.rate)
    state = await _state_of(session, job)
    speed = state.get("speed")
    text = f"copies {cli_words.size(speed)}/s at most" if speed else "copies without a limit"
    print(f"job {job} {text} from now on")
    return DONE


async def _copy_mode(session: Session, args: argparse.Namespace) -> int:
    cli_point.check_change(args)
    job = await find_job(session, args)
    points = cli_point.options_of_journal(args, args.journal)
    await session.execute("block-job-change", id=job, type="mirror", copy_mode=args.mode, **points)
    state = await _state_of(session, job)
    text = f"job {job}: copy mode {cli_words.mode(state)}"
    if args.mode == "points":
        text += "; there is no point before the event X_NBDMIRROR_POINT"
    elif state.get("x-nbdmirror-points"):
        text += ", when the target is the last point"
    elif args.mode == "write-blocking" and not state.get("actively-synced"):
        text += "; nbdmirror status shows when it is"
    print(text)
    if args.mode == "points":
        await cli_point.tell_of_outage(session, job)
    return DONE


async def _change(session: Session, args: argparse.Namespace) -> int:
    how = cli_mirror.promises(args)
    if all(value is None for value in how.values()):
        options = "--max-pause, --may, --deadline or --on-deadline"
        raise CliError(f"nothing to change: give {options}", USAGE)
    job = await find_job(session, args)
    mode = (await _state_of(session, job)).get("copy-mode")
    await session.execute("block-job-change", id=job, type="mirror", copy_mode=mode, **how)
    state = await _state_of(session, job)
    allowed_ms, may = state.get("max-pause-ms"), ", ".join(state.get("may") or ["nothing"])
    text = f"for {allowed_ms:g} ms at most" if allowed_ms else "for a second at most"
    text = f"job {job} holds guests' writes {text} at its pivot; for its end it may do: {may}"
    print("; ".join([text, *cli_words.deadline(state)]))
    return DONE


async def _dismiss(session: Session, args: argparse.Namespace) -> int:
    job = await find_job(session, args)
    await session.execute("job-dismiss", id=job)
    print(f"job {job} is dismissed")
    return DONE


async def _state_of(session: Session, job: str) -> Job:
    if (state := (await session.jobs()).get(job)) is None:
        raise CliError(f"job {job} has ended meanwhile; see: nbdmirror status")
    return state


async def _status(session: Session, args: argparse.Namespace) -> int:
    status = await session.status()
    print(json.dumps(status, indent=2) if args.json else cli_status.text(status))
    return DONE


async def _events(session: Session, args: argparse.Namespace) -> int:
    closed = asyncio.ensure_future(session.closed())
    while True:
        heard = asyncio.ensure_future(session.events.get())
        await asyncio.wait({heard, closed}, return_when=asyncio.FIRST_COMPLETED)
        first = [heard.result()] if heard.done() else []
        for event in map(dict, first + session.events.clear()):
            print(json.dumps(event) if args.json else cli_status.event_text(event), flush=True)
        if closed.done():
            heard.cancel()
            return DONE


_COMMANDS: dict[str, Callable[[Session, argparse.Namespace], Awaitable[int]]] = {
    "mirror": cli_mirror.run,
    "status": _status,
    "explain": cli_explain.run,
    "point": cli_point.run,
    "wait": _wait,
    "complete": _complete,
    "cancel": _cancel,
    "pause": _pause,
    "resume": _resume,
    "set-speed": _set_speed,
    "copy-mode": _copy_mode,
    "change": _change,
    "finalize": _finalize,
    "dismiss": _dismiss,
    "bitmap": cli_bitmaps.run,
    "events": _events,
}
