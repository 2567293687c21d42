"""The commands that speak QMP to a running server, but for `handover`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable

from nbdmirror import cli_status
from nbdmirror.cli import DONE, NO_SERVER, TIMED_OUT, CliError
from nbdmirror.cli_jobs import NoJob, Watch, find_job, only_disk
from nbdmirror.cli_progress import open_display
from nbdmirror.cli_session import Session, connect, run_interruptible, server_path

WATCH_S = 2.0


def run(args: argparse.Namespace) -> int:
    return run_interruptible(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with connect(server_path(args)) as session:
        try:
            async with asyncio.timeout(getattr(args, "timeout", None)):
                return await _COMMANDS[args.command](session, args)
        except TimeoutError as error:
            text = f"time ran out after {args.timeout:g} s; jobs on the server go on"
            raise CliError(text, TIMED_OUT) from error


# Waiting


async def _wait(session: Session, args: argparse.Namespace) -> int:
    try:
        job = await find_job(session, args)
    except NoJob as error:
        job = _ended_job(session, args, str(error))
    with open_display(time.monotonic) as display:
        watch = Watch(session, job, display)
        await watch.until(ready=args.ready)
    return watch.report(verb="wait")


def _ended_job(session: Session, args: argparse.Namespace, what: str) -> str:
    """The job that is meant, if its end was told since this command began. The events stay to be
    heard by a watch."""
    if job := cli_status.ended_job(session.events.history, args.job, args.device):
        return job
    text = "if there was one, it ended before this command looked, and how is not known"
    raise CliError(f"{what}; {text}; what is served shows: nbdmirror status")


async def _complete(session: Session, args: argparse.Namespace) -> int:
    job = await find_job(session, args)
    if not (await session.jobs()).get(job, {}).get("ready", True):
        raise CliError(f"job {job} is not ready yet; wait for it with: nbdmirror wait --ready")
    await session.execute("block-job-complete", device=job)
    with open_display(time.monotonic) as display:
        watch = Watch(session, job, display)
        state = await watch.look()
        if state and state.get("paused") and state.get("ready"):
            display.note(f"{job}: paused; it will complete after: nbdmirror resume")
        await watch.until(ready=False)
    return watch.report(verb="complete")


async def _cancel(session: Session, args: argparse.Namespace) -> int:
    job = await find_job(session, args)
    await session.execute("block-job-cancel", device=job, force=args.force or None)
    with open_display(time.monotonic) as display:
        watch = Watch(session, job, display)
        await watch.until(ready=False)
    return watch.report(verb="cancel")


# Starting


async def _mirror(session: Session, args: argparse.Namespace) -> int:
    device = args.device or await only_disk(session)
    job = args.job or device
    session.events.clear()  # an earlier job of this name is not ours
    await session.execute(
        "drive-mirror",
        device=device,
        target=args.target,
        mode="existing",
        sync=args.sync,
        job_id=args.job,
        copy_mode=args.copy_mode,
        granularity=args.granularity,
        buf_size=args.buf_size,
        speed=args.speed,
        x_nbdmirror_reconnect_delay=args.reconnect_delay,
        on_source_error=args.on_source_error,
        on_target_error=args.on_target_error,
        bitmap=args.bitmap,
        unmap=False if args.no_unmap else None,
        target_is_zero=args.target_is_zero or None,
        x_nbdmirror_target_cluster_size=args.target_cluster_size,
        x_nbdmirror_allow_larger_target=args.allow_larger_target or None,
    )
    if not args.wait:
        with open_display(time.monotonic) as display:
            watch = Watch(session, job, display)
            await watch.look()  # what fails at once has been told by now
        if watch.end:
            return watch.report(verb="mirror")
        print(f"job {job} mirrors {device} to {args.target}; see: nbdmirror status")
        return DONE
    with open_display(time.monotonic) as display:
        watch = Watch(session, job, display)
        await watch.until(ready=True)
        if args.wait == "completed" and not watch.end:
            await session.execute("block-job-complete", device=job)
            await watch.until(ready=False)
    return watch.report(verb="mirror")


# The small ones


def _verb(command: str, done: str) -> Callable[[Session, argparse.Namespace], Awaitable[int]]:
    async def act(session: Session, args: argparse.Namespace) -> int:
        job = await find_job(session, args)
        await session.execute(command, device=job, speed=getattr(args, "rate", None))
        print(f"job {job} {done}")
        return DONE

    return act


async def _status(session: Session, args: argparse.Namespace) -> int:
    if not args.watch:
        status = await session.status()
        print(json.dumps(status, indent=2) if args.json else cli_status.text(status))
        return DONE
    with cli_status.open_watcher(args.json) as watcher:
        while True:
            watcher.show(await session.status())
            session.events.clear()  # nobody reads them here
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(session.closed(), watcher.interval_s or WATCH_S)
                raise CliError("the server went away", NO_SERVER)


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
    "wait": _wait,
    "complete": _complete,
    "cancel": _cancel,
    "pause": _verb("block-job-pause", "is paused; go on with: nbdmirror resume"),
    "resume": _verb("block-job-resume", "goes on"),
    "set-speed": _verb("block-job-set-speed", "has its new speed"),
    "events": _events,
}
