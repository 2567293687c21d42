"""`nbdmirror points --exec COMMAND`: runs the user's command for each point of a job whose points
are snapshots of its target, and acknowledges the point when the command has ended well.

The command runs here, as a child of this process, and never in the server. One command runs at a
time, also beside one that outlives its killed parent: a slow copy of the target must not go on
while another client lets the target be overwritten. An answer that was lost with the connection is
sent again, and the command is not run again for that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from qemu.qmp import QMPError

from nbdmirror.cli.common import FAILED, INTERRUPTED, NO_SERVER, TIMED_OUT, CliError
from nbdmirror.cli.jobs import Watch, find_job
from nbdmirror.cli.progress import PlainDisplay
from nbdmirror.cli.session import Session, connect, run_interruptible, server_path
from nbdmirror.cli.streams import say

RETRY_S = 0.5
"""Pause between attempts to connect to a server that is gone."""

END_S_MAX = 10.0
"""How long an interrupted command may take to end after SIGTERM; then it gets SIGKILL."""

LAST_WORDS_S_MAX = 1.0
"""How long stderr is read after the command has ended: a process that it has left behind may keep
stderr open for ever."""

REASON_LENGTH_MAX = 300
"""Of the reason that the server is told, in characters."""


def run(args: argparse.Namespace) -> int:
    return run_interruptible(_run(args))


async def _run(args: argparse.Namespace) -> int:
    path = server_path(args)
    with contextlib.closing(_Turn(path)) as turn:
        async with connect(path) as session:  # what is wrong is an error now, and not later
            follower = await _Follower.of(session, args, turn)
        try:
            return await _follow_server(path, follower)
        except asyncio.CancelledError:
            raise CliError(f"interrupted; {follower.left}", INTERRUPTED) from None


async def _follow_server(path: str, follower: _Follower) -> int:
    """Follow the job of the server at `path`, which may go and come. Returns the exit status."""
    told = ""
    while True:
        try:
            async with connect(path) as session:
                if told:
                    say(f"nbdmirror: the server answers again: job {follower.job}")
                told = ""
                return await follower.follow(session)
        except CliError as error:
            if error.status not in (NO_SERVER, TIMED_OUT):
                raise
            reason = str(error)
        except (QMPError, OSError, EOFError):
            reason = "the connection to the server is lost"
        if not told:
            told = reason
            say(f"nbdmirror: {reason}; trying again")
        await asyncio.sleep(RETRY_S)


@dataclass(slots=True)
class _Verdict:
    """What became of the command for one point, for the server."""

    point: dict[str, Any]
    error: str | None
    """None: it has ended well."""
    was_sent: bool = False
    """Perhaps the server has heard it."""


class _Follower:
    """Runs `command` for the points of one job, over one connection after the other."""

    def __init__(self, job: str, device: str, command: str, turn: _Turn) -> None:
        self.job = job
        self._device = device
        self._command = command
        self._turn = turn
        self._verdict: _Verdict | None = None
        """That the server has not taken yet."""
        self._ended_before: object = None
        """When an earlier job of this name has ended."""
        self._running = 0
        """The number of the point whose command runs."""

    @classmethod
    async def of(cls, session: Session, args: argparse.Namespace, turn: _Turn) -> _Follower:
        """Raises CliError if there is no such job, or if it awaits no acknowledgements."""
        job = session.job = await find_job(session, args)
        status = await session.status()
        for disk in status["disks"]:
            for one in disk.get("jobs") or []:
                if one["device"] == job:
                    if (one.get("x-nbdmirror-points") or {}).get("auto-point", True):
                        text = f"job {job} awaits no acknowledgements: its points need none"
                        if one.get("copy-mode") != "points":
                            text = f"job {job} makes no points"
                        raise CliError(f"{text}; start one with: nbdmirror mirror --snapshots")
                    follower = cls(job, str(disk["name"]), args.exec, turn)
                    follower._ended_before = _last_end(status, job)
                    return follower
        raise CliError(f"job {job} has ended meanwhile; see: nbdmirror status")

    @property
    def left(self) -> str:
        """What is left undone, if this ends now."""
        text = f"job {self.job} continues"
        if self._running:
            text += f", and point {self._running} is not acknowledged"
        return text

    async def follow(self, session: Session) -> int:
        """Until the job has ended. Returns the exit status. Raises CliError if the server ends, and
        continues the job when it is started again."""
        watch = Watch(session, self.job, PlainDisplay(time.monotonic))
        while True:
            if self._verdict is not None:
                await self._deliver(session, self._verdict)
            state = await watch.look()
            if watch.end:
                if _last_end(await session.status(), self.job) == self._ended_before:
                    # There is no result: this is not the job's end.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(END_S_MAX):
                            await session.closed()
                    raise CliError("the server has ended", NO_SERVER)
                return await watch.report(verb="wait")
            if state is None:
                raise CliError(f"job {self.job} has ended, and its result is not known")
            point = (state.get("x-nbdmirror-points") or {}).get("awaited")
            if point and self._turn.take(self.job):
                self._running = point["sequence"]
                self._verdict = _Verdict(point, await self._run(point))
                self._running = 0
            else:
                await watch.news()

    async def _deliver(self, session: Session, verdict: _Verdict) -> None:
        """Acknowledge or refuse the point. Returns when the server has taken that, or does not want
        it."""
        number, was_sent, verdict.was_sent = verdict.point["sequence"], verdict.was_sent, True
        what = f"job {self.job}: point {number} of {_time(verdict.point)}"
        try:
            reply = await session.execute(
                "x-nbdmirror-point-ack", id=self.job, sequence=number, error=verdict.error
            )
        except CliError as error:
            if error.status != FAILED:
                raise
            say(f"nbdmirror: {what}: not acknowledged: {error}; do not use its snapshot")
        else:
            if verdict.error is not None:
                say(f"nbdmirror: {what}: the command failed: {verdict.error}")
            elif reply.get("repeated") and not was_sent:
                text = "another client has acknowledged it before; do not use this snapshot"
                say(f"nbdmirror: {what}: {text}")
            else:
                with contextlib.suppress(OSError):  # snapshots go on without a reader
                    print(f"{what}: acknowledged", flush=True)
        self._verdict = None

    async def _run(self, point: dict[str, Any]) -> str | None:
        """Run the command for a point. Returns why it has failed."""
        told = {
            "SEQUENCE": point["sequence"],
            "TIME": _time(point),
            "NAME": point.get("name", ""),
            "GROUP": point.get("group", ""),
            "ID": self.job,
            "DEVICE": self._device,
            "BYTES": point["bytes"],
        }
        try:
            child = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", self._command),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=os.environ | {f"NBDMIRROR_{name}": str(value) for name, value in told.items()},
                pass_fds=self._turn.fds,
                start_new_session=True,  # a Ctrl-C at the terminal is for this process
            )
        except OSError as error:
            return f"/bin/sh: {error.strerror}"
        words = _LastWords(child)
        try:
            status = await child.wait()
            await words.end()
        except asyncio.CancelledError:
            await _end(child)
            raise
        if status == 0:
            return None
        how = f"exit status {status}" if status > 0 else f"signal {-status}"
        return f"{how}: {words.line}" if words.line else how


def _last_end(status: dict[str, Any], job: str) -> object:
    """When the last job of this name has ended."""
    lasts = [disk.get("last-job") or {} for disk in status.get("disks", [])]
    return next((last.get("ended-at-s") for last in lasts if last.get("id") == job), None)


class _Turn:
    """The right to run commands for a job of the server at `path`, on this host. It has an end when
    this process and all commands that it has run have one: a name that they all hold."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._was_told = False

    @property
    def fds(self) -> tuple[int, ...]:
        """For a command to inherit."""
        return (self._socket.fileno(),) if self._socket is not None else ()

    def take(self, job: str) -> bool:
        """Whether it is ours now. Says once if it is not."""
        if self._socket is not None:
            return True
        place = f"{os.path.realpath(self._path)}\0{job}".encode(errors="surrogateescape")
        name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            name.bind(f"\0nbdmirror-points-{sha256(place).hexdigest()[:32]}")
        except OSError:
            name.close()
            if not self._was_told:
                text = "another nbdmirror points --exec, or the command of one that has ended, runs"
                say(f"nbdmirror: {text} for job {job}: waiting for its end")
            self._was_told = True
            return False
        self._socket = name
        return True

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


class _LastWords:
    """Passes a child's stderr on, and keeps the last line."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._stream = child.stderr
        self._tail = b""
        self._task = asyncio.ensure_future(self._read())

    @property
    def line(self) -> str:
        lines = self._tail.decode(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "")
        return "".join(c if c.isprintable() else " " for c in last).strip()[-REASON_LENGTH_MAX:]

    async def _read(self) -> None:
        assert self._stream is not None
        while chunk := await self._stream.read(4096):
            self._tail = (self._tail + chunk)[-8 * REASON_LENGTH_MAX :]
            with contextlib.suppress(OSError):
                sys.stderr.write(chunk.decode(errors="replace"))
                sys.stderr.flush()

    async def end(self) -> None:
        await asyncio.wait({self._task}, timeout=LAST_WORDS_S_MAX)
        self._task.cancel()


async def _end(child: asyncio.subprocess.Process) -> None:
    """End a child that runs, with all that it has started. Not interrupted by another signal."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        ended = asyncio.ensure_future(child.wait())
        until_s = time.monotonic() + END_S_MAX
        while not ended.done() and time.monotonic() < until_s:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({ended}, timeout=until_s - time.monotonic())
        if ended.done():
            return


def _time(point: dict[str, Any]) -> str:
    """In ISO 8601, without colons, which many names of snapshots cannot have."""
    at = datetime.fromtimestamp(point["time-s"], UTC)
    return f"{at:%Y%m%dT%H%M%S}.{at.microsecond // 1000:03d}Z"
