"""The commands that speak QMP to a running server, through QEMU's own client library.

A waiting command listens for events before it issues anything, and asks query-block-jobs at each
event and every POLL_S. The server sends events before the reply of a later command, so what was
heard when a reply came is complete up to it: nothing can end unseen in between.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError

from nbdmirror import cli_status
from nbdmirror.cli import DONE, NO_SERVER, TIMED_OUT, CliError, default_qmp_paths
from nbdmirror.cli_progress import Display, open_display

POLL_S = 0.5
WATCH_S = 2.0
CONNECT_S_MAX = 10.0
REPLY_S_MAX = 60.0
"""For commands that answer at once. What may wait for the target's network says so by events."""
DISCONNECT_S_MAX = 2.0

Job = dict[str, Any]


def run(args: argparse.Namespace) -> int:
    logging.getLogger("qemu").addHandler(logging.NullHandler())  # errors are told in our words
    logging.getLogger("qemu").propagate = False
    try:
        return asyncio.run(_interruptible(args))
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error
    except QMPError as error:
        raise CliError(f"the server went away: {error}", NO_SERVER) from error


async def _interruptible(args: argparse.Namespace) -> int:
    """Cancelled by SIGINT. asyncio's own handler turns a second one into a traceback from the
    depths; here it only asks again, and what is left to do then is bounded."""
    task = asyncio.current_task()
    assert task
    with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread: nothing to catch
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    return await _run(args)


async def _run(args: argparse.Namespace) -> int:
    async with _connect(_server_path(args)) as session:
        try:
            async with asyncio.timeout(getattr(args, "timeout", None)):
                return await _COMMANDS[args.command](session, args)
        except TimeoutError as error:
            text = f"time ran out after {args.timeout:g} s; jobs on the server go on"
            raise CliError(text, TIMED_OUT) from error


def _server_path(args: argparse.Namespace) -> str:
    if path := args.qmp or os.environ.get("NBDMIRROR_QMP"):
        return str(path)
    paths = default_qmp_paths()
    return next((path for path in paths if os.path.exists(path)), paths[0])


class _Session:
    """A conversation with one server; `events` has heard everything since its start."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self.events = EventListener()
        client.register_listener(self.events)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Arguments that are None are left out; '_' stands for '-'. A refusal is a CliError."""
        given = {
            name.replace("_", "-"): value for name, value in arguments.items() if value is not None
        }
        try:
            async with asyncio.timeout(REPLY_S_MAX) as limit:
                return await self._client.execute(command, given or None)
        except ExecuteError as error:
            raise CliError(f"{command}: {error}") from error
        except TimeoutError as error:
            if not limit.expired():
                raise
            text = f"{command}: no answer within {REPLY_S_MAX:g} s; the server may be stuck"
            raise CliError(text, TIMED_OUT) from error

    async def jobs(self) -> dict[str, Job]:
        return {job["device"]: job for job in await self.execute("query-block-jobs")}

    async def status(self) -> dict[str, Any]:
        try:
            found = await self.execute("x-nbdmirror-query-status")
        except CliError as error:
            if getattr(error.__cause__, "error_class", "") != "CommandNotFound":
                raise
            disks = cli_status.from_query_block(await self.execute("query-block"))
            jobs = await self.jobs()
            for disk in disks:
                disk["jobs"] = [jobs[disk["name"]]] if disk["name"] in jobs else []
            return {"disks": disks}
        return found if isinstance(found, dict) else {}

    async def closed(self) -> None:
        """Returns when the connection has ended."""
        await self._client.runstate_changed()


@contextlib.asynccontextmanager
async def _connect(path: str) -> AsyncIterator[_Session]:
    client = QMPClient("nbdmirror")
    session = _Session(client)
    try:
        await asyncio.wait_for(client.connect(path), CONNECT_S_MAX)
    except (ConnectError, TimeoutError) as error:
        reason = getattr(error, "exc", None)
        text = getattr(reason, "strerror", None) or "it does not answer as a QMP server does"
        advice = "start one, or name its control socket with --qmp or NBDMIRROR_QMP"
        raise CliError(f"no server at {path} ({text}): {advice}", NO_SERVER) from error
    try:
        yield session
    finally:
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            await asyncio.wait_for(client.disconnect(), DISCONNECT_S_MAX)


# Which job


class _NoJob(CliError):
    """The job that is meant is not there, or not any more."""


async def _find_job(session: _Session, args: argparse.Namespace) -> str:
    jobs = await session.jobs()
    running = f"jobs: {', '.join(jobs)}" if jobs else "there is no job at all"
    if args.job:
        if args.job in jobs:
            return str(args.job)
        raise _NoJob(f"there is no job {args.job} ({running})")
    if args.device:
        for disk in (await session.status()).get("disks", []):
            for job in disk.get("jobs", []) if disk.get("name") == args.device else []:
                return str(job["device"])
        if args.device in jobs:
            return str(args.device)
        raise _NoJob(f"disk {args.device} has no job ({running})")
    if not jobs:
        raise _NoJob("there is no job (start one with: nbdmirror mirror TARGET_URI)")
    if len(jobs) > 1:
        raise CliError(f"there are several jobs ({', '.join(jobs)}): choose one with --job")
    return next(iter(jobs))


# Waiting


class _Watch:
    """Follows one job. `end` is the event that ended it."""

    def __init__(self, session: _Session, job: str, display: Display) -> None:
        self.end: dict[str, Any] | None = None
        self.pause_ms: float | None = None
        self._session = session
        self._job = job
        self._display = display
        self._ready = False
        self._sizes: tuple[int, int] | None = None

    async def until(self, *, ready: bool) -> None:
        """Return when the job has ended, or, if `ready`, when it is ready."""
        while True:
            state = await self.look()
            if state and not self.end:
                self._display.update(state)
                self._ready = self._ready or bool(state.get("ready"))
                if state.get("status") == "concluded":  # kept for block-job-dismiss
                    self.end = {"event": cli_status.ENDS[0], "data": state}
            if self.end or (ready and self._ready):
                return
            if not state:
                raise CliError(f"job {self._job} is gone and its result was not seen")
            with contextlib.suppress(TimeoutError):
                self._hear(await asyncio.wait_for(self._session.events.get(), POLL_S))

    async def look(self) -> Job | None:
        """Hear what was told so far, and return the job's state, if it is there."""
        jobs = await self._session.jobs()
        for event in self._session.events.clear():
            self._hear(event)
        return jobs.get(self._job)

    def _hear(self, event: Any) -> None:
        name, data = event["event"], event.get("data") or {}
        if name == "X_NBDMIRROR_SIZES_DIFFER" and data.get("id") == self._job:
            self._sizes = data.get("size", 0), data.get("target-size", 0)
        if name == cli_status.PIVOTED:
            self.pause_ms = data.get("pause-ms", self.pause_ms)
        if data.get("device") != self._job:
            return
        if name == "BLOCK_JOB_READY":
            self._ready = True
        elif name == "BLOCK_JOB_ERROR":
            text = f"{self._job}: {data.get('operation', 'I/O')} error, {data.get('action')}"
            more = "; go on with: nbdmirror resume" if data.get("action") == "stop" else ""
            self._display.note(text + more)
        elif name == "BLOCK_JOB_PENDING":
            self._display.note(f"{self._job}: waits for block-job-finalize")
        elif name in cli_status.ENDS:
            self.end = dict(event)

    def report(self, *, verb: str) -> int:
        """Print how it ended, as seen from `verb`; returns the exit status."""
        if not self.end:
            print(f"job {self._job} is ready: source and target are in sync")
            return DONE
        data = self.end.get("data") or {}
        if self.end["event"] == "BLOCK_JOB_CANCELLED":
            text = f"job {self._job} was cancelled; the target may not be consistent"
            if verb != "cancel":
                raise CliError(text)
            print(text)
            return DONE
        if self._sizes:
            raise CliError(
                f"job {self._job} failed: the disk has {self._sizes[0]} bytes, the target"
                f" {self._sizes[1]}: a target must be of the disk's size, or, with"
                " --allow-larger-target, larger"
            )
        if data.get("error"):
            raise CliError(f"job {self._job} failed: {data['error']}")
        pause_ms = data.get("pause-ms", self.pause_ms)
        if verb == "cancel":
            print(f"job {self._job} ended; the target is a consistent copy, the source is served")
        elif pause_ms is not None:
            print(f"job {self._job} completed; the pivot held the guest for {pause_ms:.1f} ms")
        else:
            print(f"job {self._job} completed")
        return DONE


async def _wait(session: _Session, args: argparse.Namespace) -> int:
    try:
        job = await _find_job(session, args)
    except _NoJob as error:
        job = _ended_job(session, args, str(error))
    with open_display(time.monotonic) as display:
        watch = _Watch(session, job, display)
        await watch.until(ready=args.ready)
    return watch.report(verb="wait")


def _ended_job(session: _Session, args: argparse.Namespace, what: str) -> str:
    """The job that is meant, if its end was told since this command began. The events stay to be
    heard by a watch."""
    if job := cli_status.ended_job(session.events.history, args.job, args.device):
        return job
    text = "if there was one, it ended before this command looked, and how is not known"
    raise CliError(f"{what}; {text}; what is served shows: nbdmirror status")


async def _complete(session: _Session, args: argparse.Namespace) -> int:
    job = await _find_job(session, args)
    if not (await session.jobs()).get(job, {}).get("ready", True):
        raise CliError(f"job {job} is not ready yet; wait for it with: nbdmirror wait --ready")
    await session.execute("block-job-complete", device=job)
    with open_display(time.monotonic) as display:
        watch = _Watch(session, job, display)
        state = await watch.look()
        if state and state.get("paused") and state.get("ready"):
            display.note(f"{job}: paused; it will complete after: nbdmirror resume")
        await watch.until(ready=False)
    return watch.report(verb="complete")


async def _cancel(session: _Session, args: argparse.Namespace) -> int:
    job = await _find_job(session, args)
    await session.execute("block-job-cancel", device=job, force=args.force or None)
    with open_display(time.monotonic) as display:
        watch = _Watch(session, job, display)
        await watch.until(ready=False)
    return watch.report(verb="cancel")


# Starting


async def _mirror(session: _Session, args: argparse.Namespace) -> int:
    device = args.device or await _only_disk(session)
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
            watch = _Watch(session, job, display)
            await watch.look()  # what fails at once has been told by now
        if watch.end:
            return watch.report(verb="mirror")
        print(f"job {job} mirrors {device} to {args.target}; see: nbdmirror status")
        return DONE
    with open_display(time.monotonic) as display:
        watch = _Watch(session, job, display)
        await watch.until(ready=True)
        if args.wait == "completed" and not watch.end:
            await session.execute("block-job-complete", device=job)
            await watch.until(ready=False)
    return watch.report(verb="mirror")


async def _only_disk(session: _Session) -> str:
    disks = cli_status.from_query_block(await session.execute("query-block"))
    names = [disk["name"] for disk in disks]
    if len(names) != 1:
        listed = f"several disks ({', '.join(names)})" if names else "no disks"
        raise CliError(f"the server has {listed}: choose one with --device")
    return str(names[0])


# The small ones


def _verb(command: str, done: str) -> Callable[[_Session, argparse.Namespace], Awaitable[int]]:
    async def act(session: _Session, args: argparse.Namespace) -> int:
        job = await _find_job(session, args)
        await session.execute(command, device=job, speed=getattr(args, "rate", None))
        print(f"job {job} {done}")
        return DONE

    return act


async def _status(session: _Session, args: argparse.Namespace) -> int:
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


async def _events(session: _Session, args: argparse.Namespace) -> int:
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


_COMMANDS: dict[str, Callable[[_Session, argparse.Namespace], Awaitable[int]]] = {
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
