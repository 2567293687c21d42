"""Which job a command means, and following one to its end.

A waiting command listens for events before it issues anything, and asks query-block-jobs at each
event and every POLL_S. The server sends events before the reply of a later command, so what was
heard when a reply came is complete up to it: nothing can end unseen in between.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from typing import Any

from nbdmirror import cli_status
from nbdmirror.cli import DONE, CliError
from nbdmirror.cli_progress import Display
from nbdmirror.cli_session import Job, Session

POLL_S = 0.5
_CANCELLED = "job {} was cancelled; the target may not be consistent"


class NoJob(CliError):
    """The job that is meant is not there, or not any more."""


async def find_job(session: Session, args: argparse.Namespace) -> str:
    jobs = await session.jobs()
    running = f"jobs: {', '.join(jobs)}" if jobs else "there is no job at all"
    if args.job:
        if args.job in jobs:
            return str(args.job)
        raise NoJob(f"there is no job {args.job} ({running})")
    if args.device:
        for disk in (await session.status()).get("disks", []):
            for job in disk.get("jobs", []) if disk.get("name") == args.device else []:
                return str(job["device"])
        if args.device in jobs:
            return str(args.device)
        raise NoJob(f"disk {args.device} has no job ({running})")
    if not jobs:
        raise NoJob("there is no job (start one with: nbdmirror mirror TARGET_URI)")
    if len(jobs) > 1:
        raise CliError(f"there are several jobs ({', '.join(jobs)}): choose one with --job")
    return next(iter(jobs))


async def only_disk(session: Session) -> str:
    disks = cli_status.from_query_block(await session.execute("query-block"))
    names = [disk["name"] for disk in disks]
    if len(names) != 1:
        listed = f"several disks ({', '.join(names)})" if names else "no disks"
        raise CliError(f"the server has {listed}: choose one with --device")
    return str(names[0])


class Watch:
    """Follows one job. `end` is the event that ended it."""

    def __init__(self, session: Session, job: str, display: Display) -> None:
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

    def raise_failure(self, *, verb: str) -> None:
        """Raises CliError if the job has ended, and not as whoever gave the command `verb` wants
        it."""
        if not self.end:
            return
        data = self.end.get("data") or {}
        if self.end["event"] == "BLOCK_JOB_CANCELLED":
            if verb != "cancel":
                raise CliError(_CANCELLED.format(self._job))
        elif self._sizes:
            raise CliError(
                f"job {self._job} failed: the disk has {self._sizes[0]} bytes, the target"
                f" {self._sizes[1]}: a target must be of the disk's size, or, with"
                " --allow-larger-target, larger"
            )
        elif data.get("error"):
            raise CliError(f"job {self._job} failed: {data['error']}")

    def report(self, *, verb: str) -> int:
        """Print how it ended, as seen from `verb`; returns the exit status."""
        self.raise_failure(verb=verb)
        if not self.end:
            print(f"job {self._job} is ready: source and target are in sync")
            return DONE
        pause_ms = (self.end.get("data") or {}).get("pause-ms", self.pause_ms)
        if self.end["event"] == "BLOCK_JOB_CANCELLED":
            print(_CANCELLED.format(self._job))
        elif verb == "cancel":
            print(f"job {self._job} ended; the target is a consistent copy, the source is served")
        elif pause_ms is not None:
            print(f"job {self._job} completed; the pivot held the guest for {pause_ms:.1f} ms")
        else:
            print(f"job {self._job} completed")
        return DONE
