"""The commands that send QMP to a running server, except `handover`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

from qemu.qmp import QMPError

from nbdmirror.cli import bitmaps as cli_bitmaps
from nbdmirror.cli import explain as cli_explain
from nbdmirror.cli import point as cli_point
from nbdmirror.cli import status as cli_status
from nbdmirror.cli import watch as cli_watch
from nbdmirror.cli import words as cli_words
from nbdmirror.cli.common import DONE, FAILED, INTERRUPTED, TIMED_OUT, USAGE, CliError
from nbdmirror.cli.jobs import NoJob, Watch, disk_names, find_job, last_jobs, only_disk
from nbdmirror.cli.progress import JsonDisplay, Meter, PlainDisplay, open_display
from nbdmirror.cli.session import (
    REPLY_S_MAX,
    Job,
    Session,
    connect,
    forget_interrupt,
    jobs_of,
    run_interruptible,
    server_path,
)
from nbdmirror.names import default_job_id

PAUSE_S_MAX = 10.0
"""A pause takes effect when the requests in flight have ended: within seconds, if their servers
answer."""
RESUME_S_MAX = 5.0
"""How long to wait for the first progress of a resumed job."""
CONNECTS = 4
"""A mirror's start connects to the target, perhaps to its old side's second export, and to a
journal likewise."""
OUTLOOK_S_MAX = 2.0
"""How long a last query of a job may take when its command stops waiting."""


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
            if not session.job:
                raise
            forget_interrupt()
            raise CliError(f"interrupted; {await _outlook(session)}", INTERRUPTED) from None


async def _outlook(session: Session) -> str:
    """What the job is about to do, by a last query, when the command stops waiting for it. In
    another conversation: a server answers the commands of one client one after the other."""
    if not session.job:
        return "jobs on the server continue"
    try:
        async with asyncio.timeout(OUTLOOK_S_MAX), connect(session.path) as other:
            status = await other.status()
    except (CliError, QMPError, TimeoutError):
        return f"the state of job {session.job} is not known; see: nbdmirror status"
    if (job := jobs_of(status).get(session.job)) is None:
        if session.is_starting:
            return f"job {session.job} may still start; see: nbdmirror status"
        return f"job {session.job} has ended; see: nbdmirror status"
    parts = [f"job {Meter(time.monotonic).update(job)}"]
    parts += [remark.text for remark in cli_words.remarks(job)]
    parts += cli_words.server_troubles(status)
    if job.get("ending", "none") != "none":
        parts.append("stop that with: nbdmirror cancel --force")
    return "; ".join(parts)


# Waiting


async def _wait(session: Session, args: argparse.Namespace) -> int:
    try:
        job = await find_job(session, args)
    except NoJob as error:
        return await _report_last(session, args, str(error))
    with open_display(time.monotonic, as_json=args.json) as display:
        watch = Watch(session, job, display)
        await watch.until(ready=args.ready)
    return await watch.report(verb="wait")


async def _report_last(session: Session, args: argparse.Namespace, what: str) -> int:
    """There is no job: report how the last matching job ended."""
    lasts = last_jobs(await session.status(), args)
    if len(lasts) != 1:
        raise CliError(what)
    kind = JsonDisplay if args.json else PlainDisplay
    watch = Watch(session, str(lasts[0]["id"]), kind(time.monotonic))
    return await watch.report(verb="wait")


async def _complete(session: Session, args: argparse.Namespace) -> int:
    job = await find_job(session, args)
    with open_display(time.monotonic) as display:
        watch = Watch(session, job, display)
        await watch.look()
        await session.execute("job-complete", id=job)
        await watch.until(ready=False)
    return await watch.report(verb="complete")


async def _cancel(session: Session, args: argparse.Namespace) -> int:
    job = await find_job(session, args)
    state = (await session.jobs()).get(job, {})
    if (state.get("status"), state.get("ending"), args.force) == ("ready", "complete", False):
        raise CliError(
            f"job {job} is already being completed, and only a forced cancel stops that:"
            " nbdmirror cancel --force (the target is left unusable)"
        )
    with open_display(time.monotonic) as display:
        watch = Watch(session, job, display)
        await watch.look()
        if args.force:
            await session.execute("job-cancel", id=job)
        else:  # job-cancel has no soft cancel
            await session.execute("block-job-cancel", device=job)
        await watch.until(ready=False)
    return await watch.report(verb="cancel")


async def _finalize(session: Session, args: argparse.Namespace) -> int:
    job = await find_job(session, args)
    with open_display(time.monotonic) as display:
        watch = Watch(session, job, display)
        await watch.look()
        await session.execute("job-finalize", id=job)
        await watch.until(ready=False)
    return await watch.report(verb="finalize")


# Starting


async def _mirror(session: Session, args: argparse.Namespace) -> int:
    cli_point.check(args)
    device = args.device or await only_disk(session)
    job = args.job or default_job_id(device, await disk_names(session))
    session.events.clear()  # drop events of an earlier job with this name
    session.job, session.is_starting = job, True
    await session.execute(
        "drive-mirror",
        limit_s=REPLY_S_MAX + CONNECTS * (args.open_timeout or 0),
        device=device,
        target=args.target,
        mode="existing",
        sync=args.sync,
        job_id=args.job,
        copy_mode="points" if args.journal or args.snapshots else args.copy_mode,
        **cli_point.options(args),
        granularity=args.granularity,
        buf_size=args.buf_size,
        speed=args.speed,
        x_nbdmirror_open_timeout=args.open_timeout,
        x_nbdmirror_reconnect_delay=args.reconnect_delay,
        on_source_error=args.on_source_error,
        on_target_error=args.on_target_error,
        **_promises(args),
        bitmap=args.bitmap,
        unmap=False if args.no_unmap else None,
        target_is_zero=args.target_is_zero or None,
        x_nbdmirror_target_cluster_size=args.target_cluster_size,
        x_nbdmirror_allow_larger_target=args.allow_larger_target or None,
    )
    session.is_starting = False
    if not args.wait:
        return await _has_begun(session, args, job, device)
    if args.journal and not args.json:
        await cli_point.tell_of_outage(session, job)
    with open_display(time.monotonic, as_json=args.json) as display:
        watch = Watch(session, job, display)
        await watch.until(ready=True)
        verb = "mirror"
        if args.wait == "completed" and not watch.end:
            verb = "complete"
            await session.execute("job-complete", id=job)
            await watch.until(ready=False)
    return await watch.report(verb=verb)


async def _has_begun(session: Session, args: argparse.Namespace, job: str, device: str) -> int:
    watch = Watch(session, job, PlainDisplay(time.monotonic))
    state = await watch.look()  # an immediate failure is known by now
    if watch.end or not state:
        return await watch.report(verb="mirror")
    text = "; ".join([cli_words.state(state), *cli_words.deadline(state)])
    print(f"job {job} mirrors {device} to {args.target}: {text}; see: nbdmirror status")
    if args.journal:
        await cli_point.tell_of_outage(session, job)
    return DONE


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
    is_there = job.get("target-connected", True)
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
    points = cli_point.options_of_journal(args)
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


def _promises(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments about how a job may end; None: not given."""
    may = None if args.may is None else [word for word in args.may.split(",") if word != "nothing"]
    return {
        "x_nbdmirror_max_pause": args.max_pause,
        "x_nbdmirror_may": may,
        "x_nbdmirror_deadline": args.deadline,
        "x_nbdmirror_on_deadline": args.on_deadline,
    }


async def _change(session: Session, args: argparse.Namespace) -> int:
    how = _promises(args)
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
    "mirror": _mirror,
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
