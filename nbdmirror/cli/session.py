"""Conversations over QMP, through QEMU's own client library."""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import errno
import gc
import logging
import math
import os
import signal
import stat
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
)
from qemu.qmp.qmp_client import GreetingError

from nbdmirror.cli import words as cli_words
from nbdmirror.cli.common import FAILED, NO_SERVER, TIMED_OUT, CliError, default_qmp_paths
from nbdmirror.ending_signals import ENDING, heeded

CONNECT_S_MAX = 10.0
GREETING_S = 1.0
"""How long a server may take to greet at least, also if --timeout is less."""
REPLY_S_MAX = 60.0
"""For commands that answer at once. Commands that may wait for the target's network use events."""
DISCONNECT_S_MAX = 2.0
SERVER_ADVICE = "start one, or name its control socket with --qmp or NBDMIRROR_QMP"
OURS, QEMU = "nbdmirror", "QEMU"
FOREIGN_ADVICE = "the socket belongs to another user; run this command as that user, or as root"

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISREG, "a file"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISBLK, "a block device"),
)

Job = dict[str, Any]

# The interpreter looks for cycles in all modules before it ends, which takes longer than most
# commands. What is frozen it passes over.
atexit.register(gc.freeze)


def run_interruptible(
    command: Coroutine[Any, Any, int], signals: Sequence[signal.Signals] = ENDING
) -> int:
    """Run a command to its end. `signals` cancel it, and then raise KeyboardInterrupt."""
    # This program reports the errors itself.
    logging.getLogger("qemu").addHandler(logging.NullHandler())
    logging.getLogger("qemu").propagate = False
    try:
        return asyncio.run(_interruptible(command, signals))
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error
    except QMPError as error:
        text = "lost the connection to the server; see: nbdmirror status"
        raise CliError(text, NO_SERVER) from error


async def _interruptible(
    command: Coroutine[Any, Any, int], signals: Sequence[signal.Signals]
) -> int:
    """Run a command that `signals` cancel, those that are not ignored. asyncio's handler turns a
    second SIGINT into a traceback; here it only cancels again, and the rest of the command is
    bounded."""
    task = asyncio.current_task()
    assert task
    with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread: no signals
        for number in heeded(signals):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await command


def forget_interrupt() -> None:
    """The command has heard that it is interrupted, and goes on for a moment: limits of time do
    not work in a task that is being cancelled."""
    task = asyncio.current_task()
    assert task
    task.uncancel()


def server_path(args: argparse.Namespace) -> str:
    """The path of the control socket for a command."""
    if path := args.qmp or os.environ.get("NBDMIRROR_QMP"):
        return str(path)
    paths = default_qmp_paths()
    return next((path for path in paths if os.path.exists(path)), paths[0])


def _nothing(event: Message) -> bool:
    """A filter that no event passes."""
    return False


class Events(EventListener):
    """The unread events. The library's listener keeps each event for ever, and a monitor runs for
    weeks."""

    def __init__(self) -> None:
        super().__init__()
        self._unread: asyncio.Queue[Message] = asyncio.Queue()

    async def put(self, event: Message) -> None:
        if self.accept(event):
            await self._unread.put(event)

    async def get(self) -> Message:
        return await self._unread.get()

    def empty(self) -> bool:
        return self._unread.empty()

    def ignore_all(self) -> None:
        """Drop all events from now on."""
        self.event_filter = _nothing
        self.clear()

    def clear(self) -> list[Message]:
        return [self._unread.get_nowait() for _ in range(self._unread.qsize())]


class Session:
    """A conversation with one server, or QEMU; `events` has all events since its start."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self.path = ""
        """The server's control socket."""
        self.job = ""
        """The job that the command is about, when known."""
        self._parts: list[Session] = []
        self.is_starting = False
        """The job was requested, and the answer has not come yet."""
        self.events = Events()
        client.events.event_filter = _nothing  # the library's listener, which cannot be removed
        client.register_listener(self.events)

    def beside(self) -> Session:
        """The same conversation, about another job, with events of its own from now on."""
        other = Session(self._client)
        other.path = self.path
        self._parts.append(other)
        return other

    @property
    def watched(self) -> list[str]:
        """The jobs that the command is about, as far as they are known."""
        return [one.job for one in (self, *self._parts) if one.job]

    async def execute(
        self, command: str, *, limit_s: float | None = REPLY_S_MAX, **arguments: Any
    ) -> Any:
        """Execute a QMP command. Arguments that are None are left out; '_' stands for '-'. Raises
        CliError if the server refuses. `limit_s`: how long the answer may take."""
        given = as_arguments(**arguments)
        try:
            async with asyncio.timeout(limit_s) as limit:
                return await self._client.execute(command, given or None)
        except ExecuteError as error:
            raise CliError(cli_words.refusal(str(error))) from error
        except TimeoutError as error:
            if not limit.expired():
                raise
            text = f"{command}: no answer within {limit_s:g} s; the server may be stuck"
            raise CliError(text, TIMED_OUT) from error

    @property
    def _version(self) -> dict[str, Any]:
        """The version in the greeting."""
        greeting = self._client.greeting
        return dict(greeting.QMP.version) if greeting else {}

    @property
    def package(self) -> str:
        """The server's program and version, as in the greeting."""
        return str(self._version.get("package", ""))

    @property
    def program(self) -> str:
        """The server's program, and its version; QEMU's storage daemon has QEMU's greeting."""
        if self.package.split(" ")[0] == OURS:
            return self.package
        numbers = self._version.get("qemu") or {}
        version = [str(numbers[key]) for key in ("major", "minor", "micro") if key in numbers]
        return f"{QEMU} {'.'.join(version)}".rstrip()

    async def jobs(self) -> dict[str, Job]:
        """The jobs, by their IDs."""
        return jobs_of(await self.status())

    async def status(self) -> dict[str, Any]:
        found = await self.execute("x-nbdmirror-query-status")
        return found if isinstance(found, dict) else {}

    async def job_map(self, job: str, cells: int) -> dict[str, Any]:
        """The map of a job's disk. Empty if there is none: the job has ended, or the server is
        older."""
        try:
            found = await self.execute("x-nbdmirror-query-job-map", id=job, cells=cells)
        except CliError as error:
            if error.status != FAILED:
                raise
            return {}
        return found if isinstance(found, dict) else {}

    async def closed(self) -> None:
        """Wait until the connection has ended."""
        await self._client.runstate_changed()


def as_arguments(**given: Any) -> dict[str, Any]:
    """QMP's arguments: those that are None are left out; '_' stands for '-'."""
    return {name.replace("_", "-"): value for name, value in given.items() if value is not None}


def jobs_of(status: dict[str, Any]) -> dict[str, Job]:
    """The jobs of a server's status, by their IDs."""
    disks = status.get("disks", [])
    return {job["device"]: job for disk in disks for job in disk.get("jobs") or []}


@contextlib.asynccontextmanager
async def connect(
    path: str, *, program: str = OURS, advice: str = SERVER_ADVICE, limit_s: float = math.inf
) -> AsyncIterator[Session]:
    """A conversation with the `program` that listens at `path`. Raises CliError if another program
    or none listens there; `advice`: what to do then. `limit_s`: the user's limit of time."""
    limit_s = min(CONNECT_S_MAX, max(GREETING_S, limit_s))
    client = QMPClient("nbdmirror")
    session = Session(client)
    session.path = path
    what = "server" if program == OURS else program
    try:
        async with asyncio.timeout(limit_s):
            await client.connect(path)
    except TimeoutError as error:
        text = f"the process that listens at {path} does not answer within {limit_s:g} s:"
        text += " it hangs, or is stopped, or is another program"
        raise CliError(text, TIMED_OUT) from error
    except ConnectError as error:
        reason = getattr(error, "exc", None)
        if isinstance(reason, GreetingError):
            text = f"{what} at {path}: sends no QMP greeting: the socket belongs to another program"
            text += ", or too many clients are connected: end some, or try again later"
            raise CliError(text, NO_SERVER) from error
        if isinstance(reason, ConnectionResetError | BrokenPipeError | EOFError):
            raise _closed(path, what) from error
        text = _why_nobody_answers(path, reason)
        if not text:
            text = f"{what} at {path}: {os.strerror(errno.EACCES)}: {FOREIGN_ADVICE}"
            raise CliError(text, NO_SERVER) from error
        raise CliError(f"no {what} at {path} ({text}): {advice}", NO_SERVER) from error
    except AssertionError as error:  # the library's, if the connection is closed at its beginning
        await _disconnect(client)
        raise _closed(path, what) from error
    try:
        if session.program.split(" ")[0] != program:
            text = f"{path} is the control socket of {session.program}, not of {program}"
            raise CliError(f"{text}: {advice}", NO_SERVER)
        yield session
    finally:
        await _disconnect(client)


async def _disconnect(client: QMPClient) -> None:
    with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
        async with asyncio.timeout(DISCONNECT_S_MAX):
            await client.disconnect()


def _closed(path: str, what: str) -> CliError:
    text = f"the {what} at {path} closed the connection without an answer: it has ended,"
    text += " or lacks open files, threads or memory; its log says why"
    return CliError(text, NO_SERVER)


def no_socket(path: str) -> str:
    """What is at `path`, if it is not a socket; else empty."""
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        if not stat.S_ISSOCK(mode):
            kind = next((kind for is_one, kind in _KINDS if is_one(mode)), "a device")
            return f"that is {kind}, not a socket"
    return ""


def _why_nobody_answers(path: str, error: BaseException | None) -> str:
    """ "" if the socket belongs to another user. For a file or a directory the kernel has the same
    error as for a socket without a server."""
    if text := no_socket(path):
        return text
    if isinstance(error, PermissionError):
        return ""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "it does not answer as a QMP server"
