"""`nbdmirror status --watch`: the status again and again, until interrupted.

A live view outlives its server: it says that the server is gone, and continues when a server
answers at the same socket. Lines end with the connection, for the script that reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from qemu.qmp import QMPError

from nbdmirror.cli import status as cli_status
from nbdmirror.cli.common import NO_SERVER, CliError
from nbdmirror.cli.progress import Meter
from nbdmirror.cli.session import Session, connect
from nbdmirror.cli.streams import is_live
from nbdmirror.cli.words import SILENT_S, duration

LINES_S = 2.0
LIVE_S = 0.5
MAPS_MAX = 8
"""Jobs with a map; more do not fit into most windows."""

Maps = dict[str, dict[str, Any]]


class View(Protocol):
    @property
    def map_cells(self) -> int: ...
    def heard(self, event: Mapping[str, Any]) -> None: ...
    def show(self, status: dict[str, Any], maps: Maps, trouble: str = "") -> None:
        """`trouble`: why the status is not of now."""


async def watch(as_json: bool, path: str) -> int:
    """Show the server at `path` until interrupted. Raises CliError if no server is there, and, for
    lines, when the connection ends."""
    if as_json or not is_live(sys.stdout):
        async with connect(path) as session:
            await _print_lines(session, as_json)
    async with connect(path):
        pass  # a socket without a server is an error now, and not later
    from nbdmirror.cli.live import HostView

    with HostView() as view:
        live = _Live(view, path)
        while True:
            await live.follow_server()


async def _print_lines(session: Session, as_json: bool) -> NoReturn:
    session.events.ignore_all()
    meters: dict[str, Meter] = {}
    while True:
        status = await session.status()
        print(json.dumps(status) if as_json else cli_status.text(status, meters), flush=True)
        if await _is_closed(session, LINES_S):
            raise CliError("lost the connection to the server", NO_SERVER)


async def _is_closed(session: Session, within_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await session.closed()
        return True
    return False


class _Live:
    """What a live view shows of the server at `path`, which may go and come."""

    def __init__(self, view: View, path: str) -> None:
        self._view = view
        self._path = path
        self._status: dict[str, Any] = {}
        self._maps: Maps = {}
        self._answered_s = time.monotonic()

    async def follow_server(self) -> None:
        """Show the server that listens now, until the connection is lost, and then that it is."""
        reason = "the connection to the server is lost"
        try:
            async with connect(self._path) as session:
                await self._follow(session)
        except CliError as error:
            reason = str(error)
        except (QMPError, OSError, EOFError):
            pass
        text = f"{reason}; trying again; this was the status {self._silence} ago:"
        self._view.show(self._status, self._maps, text)
        await asyncio.sleep(LIVE_S)

    async def _follow(self, session: Session) -> None:
        while True:
            await self._ask(session)
            for event in session.events.clear():
                self._view.heard(event)
            self._view.show(self._status, self._maps)
            if await _is_closed(session, LIVE_S):
                return

    async def _ask(self, session: Session) -> None:
        """Meanwhile a server that does not answer is shown as such."""
        answer = asyncio.ensure_future(self._answer(session))
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=1)
                if not answer.done() and time.monotonic() - self._answered_s > SILENT_S:
                    text = f"the server does not answer; this was the status {self._silence} ago:"
                    self._view.show(self._status, self._maps, text)
            self._status, self._maps = answer.result()
            self._answered_s = time.monotonic()
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    async def _answer(self, session: Session) -> tuple[dict[str, Any], Maps]:
        status = await session.status()
        jobs = [job for disk in status.get("disks", []) for job in disk.get("jobs") or []]
        names = [str(job.get("device")) for job in jobs if job.get("status") != "concluded"]
        cells = self._view.map_cells
        return status, {name: await session.job_map(name, cells) for name in names[:MAPS_MAX]}

    @property
    def _silence(self) -> str:
        return duration(time.monotonic() - self._answered_s)
