"""The job that a command is about, and waiting for its end.

A waiting command queries the server's status at each event and every POLL_S, and then reads the
events. Its last message comes from its last query: the server reports a job's end, and what the
disk is served from, whichever client ended the job, and whenever."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from typing import Any

from nbdmirror.cli import status as cli_status
from nbdmirror.cli import words as cli_words
from nbdmirror.cli.common import DONE, NO_SERVER, CliError
from nbdmirror.cli.progress import Display
from nbdmirror.cli.session import Job, Session
from nbdmirror.partial_target import is_partial, target_text
from nbdmirror.point_sentences import APPLIER_AGAIN

POLL_S = 0.5
SERVER_END_S_MAX = 5.0
"""How long a server that cancels its jobs because it ends may take to end its conversations."""


class NoJob(CliError):
    """The job does not exist, or not any more."""


async def find_job(session: Session, args: argparse.Namespace) -> str:
    status = await session.status()
    jobs = {job["device"]: disk for disk in status["disks"] for job in disk.get("jobs") or []}
    if args.job:
        if args.job in jobs:
            return str(args.job)
        raise _no_job(f"there is no job {args.job}", status, args)
    if args.device:
        if args.device not in [disk.get("name") for disk in status["disks"]]:
            names = ", ".join(str(disk.get("name")) for disk in status["disks"])
            raise CliError(f"there is no disk {args.device}; the server's disks are: {names}")
        for job, disk in jobs.items():
            if disk.get("name") == args.device:
                return str(job)
        raise _no_job(f"disk {args.device} has no job", status, args)
    if not jobs:
        raise _no_job("there is no job", status, args)
    if len(jobs) > 1:
        raise CliError(f"there are several jobs ({', '.join(jobs)}): choose one with --job")
    return str(next(iter(jobs)))


def one_by_one(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """For commands that take several: for each --device or --job, by its value, arguments with it
    alone. Without any: one with none."""
    if args.device:
        return {one: argparse.Namespace(device=one, job=None) for one in args.device}
    return {one: argparse.Namespace(device=None, job=one or None) for one in args.job or [""]}


async def find_jobs(session: Session, args: argparse.Namespace) -> list[str]:
    """Those that are given, each once."""
    found = [await find_job(session, one) for one in one_by_one(args).values()]
    return list(dict.fromkeys(found))


def _no_job(what: str, status: dict[str, Any], args: argparse.Namespace) -> NoJob:
    last = [f"the last job {cli_status.result_text(one)}" for one in last_jobs(status, args)]
    others = [str(job["device"]) for disk in status["disks"] for job in disk.get("jobs") or []]
    last += [f"the jobs are: {', '.join(others)}"] if others else []
    start = "start one with: nbdmirror mirror TARGET_URI"
    return NoJob("; ".join([what, *last]) if last else f"{what} ({start})")


def last_jobs(status: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The last jobs of the disks that match the arguments."""
    found = [
        {**disk["last-job"], "disk": disk.get("name")}
        for disk in status.get("disks", [])
        if disk.get("last-job") and args.device in (None, disk.get("name"))
    ]
    return [last for last in found if args.job in (None, last.get("id"))]


async def disk_names(session: Session) -> list[str]:
    return [str(disk["name"]) for disk in (await session.status()).get("disks", [])]


async def only_disk(session: Session) -> str:
    names = await disk_names(session)
    if len(names) != 1:
        listed = f"several disks ({', '.join(names)})" if names else "no disks"
        raise CliError(f"the server has {listed}: choose one with --device")
    return names[0]


class Watch:
    """Follows one job. `end` is the event that ended it."""

    def __init__(self, session: Session, job: str, display: Display) -> None:
        self.end: dict[str, Any] | None = None
        self.pivoted = False
        self._session = session
        session.job = job
        self._job = job
        self._display = display
        self._is_ready = False
        self._sizes: tuple[int, int] | None = None
        self._sync = "full"
        self._result: dict[str, Any] = {}
        self._disk: dict[str, Any] = {}
        self._heard: list[Any] = []
        self._told: set[str] = set()
        self._troubles: list[str] = []
        """What is wrong with the server, beside the job."""
        self._earlier: dict[str, Any] = {}
        """The result of an earlier job of this name, while this one runs."""

    async def until(self, *, ready: bool) -> None:
        """Return when the job has ended, or, if `ready`, when it is ready."""
        while True:
            state = await self.look()
            if state and not self.end:
                cells = self._display.map_cells
                job_map = await self._session.job_map(self._job, cells) if cells else None
                self._display.update(state, job_map)
                self._tell(state)
                is_ready = state.get("ready") or state.get("status") in ("waiting", "pending")
                self._is_ready = self._is_ready or bool(is_ready)
            if self.end or (ready and self._is_ready):
                return
            if not state:
                raise CliError(f"job {self._job} has ended, and its result is not known")
            await self.news()

    async def news(self) -> None:
        """Return at the next event, or after POLL_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                self._heard.append(await self._session.events.get())

    async def look(self, *, is_second: bool = False) -> Job | None:
        """Query the job's state, and read the events so far. None: the job does not exist any
        more."""
        status = await self._session.status()
        self._troubles = cli_words.server_troubles(status)
        found = None
        for disk in status.get("disks", []):
            for job in disk.get("jobs") or []:
                if job["device"] == self._job:
                    self._disk, found = disk, job
        if not found:
            self._disk = self._disk_of_last(status.get("disks", []))
        heard, self._heard = [*self._heard, *self._session.events.clear()], []
        for event in heard:
            self._hear(event, found or {})
        if found is None or found.get("status") == "concluded":
            self._see_the_end(found)
        elif not self.end:
            self._earlier = self._last_job
            self._sync = found.get("sync", self._sync)
        elif not is_second:  # it ended after the answer: query again
            return await self.look(is_second=True)
        else:  # this is another job of that name
            self._see_the_end(None)
            return None
        return found

    def _disk_of_last(self, disks: list[dict[str, Any]]) -> dict[str, Any]:
        """The disk of the job, which exists no more. Jobs of other disks may have had its ID: if
        this job was never seen, the last one that has ended counts."""
        if self._disk:
            name = self._disk.get("name")
            return next((disk for disk in disks if disk.get("name") == name), self._disk)
        ended = [disk for disk in disks if (disk.get("last-job") or {}).get("id") == self._job]
        return max(ended, key=lambda disk: disk["last-job"].get("ended-at-s", 0), default={})

    @property
    def _last_job(self) -> dict[str, Any]:
        """The disk's last job, if it had this name."""
        last: dict[str, Any] = self._disk.get("last-job") or {}
        return last if last.get("id") == self._job else {}

    def check_not_ended(self) -> None:
        """Raise CliError, with the job's result, if the last query found a concluded job."""
        if self.end:
            how = cli_status.result_text(self._result) if self._result else self._job
            text = f"job {self._job} has ended already ({how})"
            raise CliError(f"{text}; remove it with: nbdmirror dismiss")

    def _see_the_end(self, job: Job | None) -> None:
        last = self._last_job
        if last and last != self._earlier:
            self._result = last
            self.pivoted = bool(last.get("pivoted"))
            self._sync = last.get("sync", self._sync)
        if self.end is None and (job or self._result):
            is_cancelled = self._result.get("result") == "cancelled"
            failure = self._result.get("reason") if not is_cancelled else None
            data = job or ({"error": failure} if failure else {})
            self.end = {"event": cli_status.ENDS[is_cancelled], "data": data}

    def _hear(self, event: Any, job: Job) -> None:
        name, data = event["event"], event.get("data") or {}
        if data.get("id", data.get("device")) != self._job:  # with an ID, "device" is the disk
            return
        self._display.heard(event)
        if name == "X_NBDMIRROR_SIZES_DIFFER":
            self._sizes = data.get("size", 0), data.get("target-size", 0)
        elif name == cli_status.PIVOTED:
            self.pivoted = True
            self._result = {**self._result, "pause-ms": data.get("pause-ms")}
        elif name == "BLOCK_JOB_READY":
            self._is_ready = True
        elif name == "BLOCK_JOB_ERROR" and data.get("action") != "report":
            what = f"{data.get('operation', 'I/O')} error: {cli_words.last_error(job)}"
            then = "trying again"
            if data.get("action") == "stop":
                then = "continue with: nbdmirror resume"
            self._display.note(f"{self._job}: {what}; {then}")
        elif name == "X_NBDMIRROR_APPLIER" and data.get("works"):
            self._display.note(f"{self._job}: {APPLIER_AGAIN}")
        elif name in cli_status.ENDS and data.get("device") == self._job:
            self.end = dict(event)

    def _tell(self, job: Job) -> None:
        """Print the remarks on the job, and what is wrong with its server; each kind once while it
        lasts."""
        silent = {"error", "retry", "failure"}  # events report these
        if job.get("ending-for-s", 0) < cli_words.SILENT_S and job.get("status") != "standby":
            silent.add("ending")  # the user has requested it
        remarks = [one for one in cli_words.remarks(job) if one.kind not in silent]
        remarks += [cli_words.Remark("server", text) for text in self._troubles]
        awaited = (job.get("x-nbdmirror-points") or {}).get("awaited")
        if awaited and not job.get("ready"):
            text = f"point {awaited.get('sequence')} waits for its snapshot"
            text += "; snapshots are made by: nbdmirror points --exec"
            remarks.append(cli_words.Remark("awaited", text))
        for remark in remarks:
            if remark.kind not in self._told:
                self._display.note(f"{self._job}: {remark.text}")
        self._told = {remark.kind for remark in remarks}

    def raise_failure(self, *, verb: str) -> None:
        """Raise CliError if the job has ended in another way than the command `verb` wants."""
        if not self.end:
            return
        data = self.end.get("data") or {}
        if self.end["event"] == "BLOCK_JOB_CANCELLED":
            if verb != "cancel":
                raise CliError(f"{self._cancelled}{self._served}")
        elif self._sizes:
            raise CliError(
                f"job {self._job} failed: the disk has {self._sizes[0]} bytes, the target"
                f" {self._sizes[1]}: a target must be of the disk's size, or, with"
                " --allow-larger-target, larger"
            )
        elif data.get("error"):
            reason = self._result.get("reason") or data["error"]
            raise CliError(f"job {self._job} failed: {reason}{self._served}")

    @property
    def _cancelled(self) -> str:
        why = self._result.get("reason") or "cancelled"
        return f"job {self._job} was cancelled ({why}); the target may not be consistent"

    @property
    def _served(self) -> str:
        """What the disk is served from, by the last query."""
        name, source = self._disk.get("name"), self._disk.get("source")
        return f"; disk {name} is served from {source}" if source else ""

    async def _check_server(self) -> None:
        """Raise CliError if the job was cancelled because the server ends: there is no result then
        if the mirror is to continue."""
        if self._result or not self.end or self.end["event"] != "BLOCK_JOB_CANCELLED":
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SERVER_END_S_MAX):
                await self._session.closed()
            text = "the server has ended; with --state-dir the mirror continues at its next start"
            raise CliError(f"job {self._job}: {text}", NO_SERVER)

    async def report(self, *, verb: str) -> int:
        """Print how the job ended, for the command `verb`, and what the disk is served from now.
        Returns the exit status."""
        state = await self.look()
        await self._check_server()
        self.raise_failure(verb=verb)
        if self.end and verb == "pause":
            how = "completed" if self.pivoted else "ended"
            raise CliError(f"job {self._job} {how} meanwhile: it was not paused{self._served}")
        partial = f"; the target {target_text(self._sync)}" if is_partial(self._sync) else ""
        if not self.end:
            state_text = cli_words.state(state or {})
            if state_text == "ready":
                what = "the target follows the source"
                if "sequence" in ((state or {}).get("x-nbdmirror-points") or {}):
                    what = "the far side has a point"
                self._display.result(f"job {self._job} is ready: {what}{partial}")
            else:
                self._display.result(f"job {self._job} was ready, and is {state_text} now")
            return DONE
        if self.end["event"] == "BLOCK_JOB_CANCELLED":
            self._display.result(f"{self._cancelled}{self._served}")
            return DONE
        held = cli_status.held_text(self._result) if self.pivoted else ""
        copy = f"{self._result.get('target', 'the target')} {target_text(self._sync)}"
        if self.pivoted and verb == "cancel":
            raise CliError(f"job {self._job} had already been completed{held}{self._served}")
        if not self.pivoted and verb in ("complete", "completed"):
            text = f"job {self._job} was cancelled by another client after READY; {copy}"
            raise CliError(f"{text}{self._served}")
        if self.pivoted:
            self._display.result(f"job {self._job} completed{held}{self._served}{partial}")
        else:
            self._display.result(f"job {self._job} ended; {copy}{self._served}")
        return DONE
