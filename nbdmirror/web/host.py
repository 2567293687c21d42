"""The servers of a host, each asked for its status every two seconds by a task for itself: a server
that hangs holds up no other, and however many HTTP clients there are, no server is asked more often
for them.

How servers are found and spoken to is given: this module knows neither QMP nor places. On the event
loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

INTERVAL_S = 2.0
"""Between two questions to a server, and between two searches for servers."""
INTERVAL_S_MIN = 0.5
"""A server with news is asked sooner, but not sooner than this."""
ANSWER_S_MAX = 5.0
SERVERS_MAX = 256
"""More are not asked; `Host.left_out` counts them."""


class NoAnswer(Exception):
    """A server cannot be asked; the text says why, in one line."""


class Conversation(Protocol):
    """With one server. All may raise NoAnswer."""

    def status(self) -> Awaitable[Any]: ...
    def events(self) -> Awaitable[list[dict[str, Any]]]:
        """Those that have come since the last call, one at least: waits for it."""


Find = Callable[[], Iterable[str]]
Connect = Callable[[str], AbstractAsyncContextManager[Conversation]]


@dataclass(frozen=True, slots=True)
class Report:
    """What a server has said of itself at `time_s`, in seconds since 1970; or why it has not."""

    socket: str
    time_s: float
    status: dict[str, Any] = field(default_factory=dict)
    """Of x-nbdmirror-query-status."""
    error: str = ""

    @property
    def disks(self) -> list[dict[str, Any]]:
        return records(self.status, "disks")

    @property
    def as_json(self) -> dict[str, Any]:
        """As `nbdmirror list --json` has it."""
        what = {"error": self.error} if self.error else self.status
        return {"qmp": self.socket, **what}


def records(owner: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The list of objects that is there. Empty where there is none: servers differ in age."""
    found = owner.get(key)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def plain(value: Any) -> Any:
    """JSON without what not all of its readers can read: half characters, as in the name of a file
    that is not UTF-8, and numbers that are none."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items()}
    return value


class Host:
    """`find` gives the control sockets that there are now; `time_s` seconds since 1970. A report is
    replaced, and never changed."""

    def __init__(self, find: Find, connect: Connect, time_s: Callable[[], float]) -> None:
        self.left_out = 0
        self._find = find
        self._connect = connect
        self._time_s = time_s
        self._reports: dict[str, Report] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        """Those, and of servers that are there no more."""

    @property
    def reports(self) -> list[Report]:
        """Of all servers that there are and were asked, by their sockets' names."""
        return [report for _, report in sorted(self._reports.items())]

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                self._look()
                await asyncio.sleep(INTERVAL_S)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _look(self) -> None:
        there = list(dict.fromkeys(self._find()))
        self.left_out = max(0, len(there) - SERVERS_MAX)
        there = there[:SERVERS_MAX]
        for socket in self._watching.keys() - set(there):
            self._watching.pop(socket).cancel()
            self._reports.pop(socket, None)
        for socket in there:
            if socket not in self._watching:
                task = asyncio.ensure_future(self._watch(socket))
                self._watching[socket] = task
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _watch(self, socket: str) -> None:
        while True:
            try:
                await self._converse(socket)
            except NoAnswer as error:
                self._report(socket, error=str(error))
            except TimeoutError:
                self._report(socket, error=f"no answer within {ANSWER_S_MAX:g} s")
            except Exception as error:  # noqa: BLE001 - the others are to be shown nevertheless
                self._report(socket, error=f"the server's answer cannot be understood: {error!r}")
            await asyncio.sleep(INTERVAL_S)

    async def _converse(self, socket: str) -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(ANSWER_S_MAX):
                server = await stack.enter_async_context(self._connect(socket))
            while True:
                async with asyncio.timeout(ANSWER_S_MAX):
                    status = await server.status()
                if not isinstance(status, dict):
                    raise NoAnswer("the server does not answer as an nbdmirror does")
                self._report(socket, plain(status))
                await asyncio.sleep(INTERVAL_S_MIN)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(INTERVAL_S - INTERVAL_S_MIN):
                        await server.events()

    def _report(self, socket: str, status: dict[str, Any] | None = None, error: str = "") -> None:
        """Unless the server is there no more."""
        if asyncio.current_task() is self._watching.get(socket):
            self._reports[socket] = Report(
                plain(socket), self._time_s(), status or {}, plain(error)
            )
