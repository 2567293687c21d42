"""Conversations over QMP, through QEMU's own client library."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError

from nbdmirror import cli_status, cli_words
from nbdmirror.cli import NO_SERVER, TIMED_OUT, CliError, default_qmp_paths

CONNECT_S_MAX = 10.0
REPLY_S_MAX = 60.0
"""For commands that answer at once. What may wait for the target's network says so by events."""
DISCONNECT_S_MAX = 2.0
SERVER_ADVICE = "start one, or name its control socket with --qmp or NBDMIRROR_QMP"
FOREIGN_ADVICE = "the socket is another user's; run this as the one who started it, or as root"

Job = dict[str, Any]


def run_interruptible(command: Coroutine[Any, Any, int]) -> int:
    """Run a command to its end. SIGINT cancels it, and is a KeyboardInterrupt then."""
    logging.getLogger("qemu").addHandler(logging.NullHandler())  # errors are told in our words
    logging.getLogger("qemu").propagate = False
    try:
        return asyncio.run(_interruptible(command))
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error
    except QMPError as error:
        raise CliError("the server went away; see: nbdmirror status", NO_SERVER) from error


async def _interruptible(command: Coroutine[Any, Any, int]) -> int:
    """Cancelled by SIGINT. asyncio's own handler turns a second one into a traceback from the
    depths; here it only asks again, and what is left to do then is bounded."""
    task = asyncio.current_task()
    assert task
    with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread: nothing to catch
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    return await command


def server_path(args: argparse.Namespace) -> str:
    """The control socket that a command means."""
    if path := args.qmp or os.environ.get("NBDMIRROR_QMP"):
        return str(path)
    paths = default_qmp_paths()
    return next((path for path in paths if os.path.exists(path)), paths[0])


class Session:
    """A conversation with one server, or QEMU; `events` has heard everything since its start."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self.job = ""
        """The job that the command is about, once it is known."""
        self.is_starting = False
        """That job was asked for, and whether it has begun was not answered yet."""
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
            raise CliError(cli_words.refusal(str(error))) from error
        except TimeoutError as error:
            if not limit.expired():
                raise
            text = f"{command}: no answer within {REPLY_S_MAX:g} s; the server may be stuck"
            raise CliError(text, TIMED_OUT) from error

    @property
    def package(self) -> str:
        """What the server says that it is."""
        greeting = self._client.greeting
        return str(greeting.QMP.version.get("package", "")) if greeting else ""

    async def jobs(self) -> dict[str, Job]:
        """By their ids."""
        disks = (await self.status()).get("disks", [])
        return {job["device"]: job for disk in disks for job in disk.get("jobs") or []}

    async def status(self) -> dict[str, Any]:
        try:
            found = await self.execute("x-nbdmirror-query-status")
        except CliError as error:
            if getattr(error.__cause__, "error_class", "") != "CommandNotFound":
                raise
            disks = cli_status.from_query_block(await self.execute("query-block"))
            jobs = {job["device"]: job for job in await self.execute("query-block-jobs")}
            for disk in disks:
                disk["jobs"] = [jobs[disk["name"]]] if disk["name"] in jobs else []
            return {"disks": disks}
        return found if isinstance(found, dict) else {}

    async def closed(self) -> None:
        """Returns when the connection has ended."""
        await self._client.runstate_changed()


@contextlib.asynccontextmanager
async def connect(
    path: str, *, what: str = "server", advice: str = SERVER_ADVICE
) -> AsyncIterator[Session]:
    """A conversation with whoever listens at `path`. `advice`: what to do if nobody does."""
    client = QMPClient("nbdmirror")
    session = Session(client)
    try:
        await asyncio.wait_for(client.connect(path), CONNECT_S_MAX)
    except (ConnectError, TimeoutError) as error:
        reason = getattr(error, "exc", None)
        if isinstance(reason, PermissionError):
            text = f"{what} at {path}: {reason.strerror}: {FOREIGN_ADVICE}"
            raise CliError(text, NO_SERVER) from error
        text = getattr(reason, "strerror", None) or "it does not answer as a QMP server does"
        raise CliError(f"no {what} at {path} ({text}): {advice}", NO_SERVER) from error
    try:
        yield session
    finally:
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            await asyncio.wait_for(client.disconnect(), DISCONNECT_S_MAX)
