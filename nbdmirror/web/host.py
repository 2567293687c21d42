"""The servers of a host, each asked for its status every two seconds by a task for itself: a server
that hangs holds up no other, and however many HTTP clients there are, no server is asked more often
for them.

The caller gives the ways to find servers and to speak to them: this module knows neither QMP nor
places. On the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

from nbdmirror.cli import words
from nbdmirror.web.history import History
from nbdmirror.web.records import Record, Report, plain, records

INTERVAL_S = 2.0
"""Between two questions to a server, and between two searches for servers."""
INTERVAL_S_MIN = 0.5
"""A server with news is asked sooner, but not sooner than this."""
ANSWER_S_MAX = 5.0
MAPS_MAX = 4
"""A server is asked for the maps of so many of its jobs at a time, one job after the other."""
MAP_CELLS = 128
SERVERS_MAX = 256
"""More are not asked; `Host.left_out` counts them."""


class NoAnswer(Exception):
    """A server cannot be asked; the text says why, in one line."""


class Conversation(Protocol):
    """With one server. All may raise NoAnswer."""

    def status(self) -> Awaitable[Any]: ...
    def job_map(self, job: str, cells: int) -> Awaitable[Any]:
        """The map of a job's disk; empty if there is none."""

    def events(self) -> Awaitable[list[News]]:
        """Those that have come since the last call, one at least: waits for it."""


class News(NamedTuple):
    """An event. `is_routine`: it comes again and again, as planned, and says no more than the next
    status does."""

    text: str
    is_routine: bool = False


Find = Callable[[], Iterable[str]]
Connect = Callable[[str], AbstractAsyncContextManager[Conversation]]


class Host:
    """`find` gives the control sockets that there are now; `time_s` seconds since 1970, `clock`
    monotonic ones. A report is replaced, and never changed."""

    def __init__(
        self,
        find: Find,
        connect: Connect,
        time_s: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self.left_out = 0
        self.history = History(time_s)
        self.version = 0
        """Higher whenever anything has changed."""
        self._find = find
        self._connect = connect
        self.clock = clock
        self._time_s = time_s
        self._reports: dict[str, Report] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        """Those, and of servers that are there no more."""
        self._news = asyncio.Event()

    @property
    def reports(self) -> list[Report]:
        """Of all servers that there are and were asked, by their sockets' names."""
        return [report for _, report in sorted(self._reports.items())]

    @property
    def unanswered(self) -> int:
        """Servers that were found and have not answered yet, nor failed to."""
        return len(self._watching.keys() - self._reports.keys())

    async def changed(self) -> None:
        """Returns when anything has changed since the call."""
        await self._news.wait()

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
            if self._reports.pop(socket, None):
                self.history.forget(plain(socket))
                self._tell(socket, "is there no more")
        for socket in there:
            if socket not in self._watching:
                task = asyncio.ensure_future(self._watch(socket))
                self._watching[socket] = task
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                self._wake()

    async def _watch(self, socket: str) -> None:
        while True:
            try:
                await self._converse(socket)
            except NoAnswer as error:
                self._report(socket, error=str(error))
            except TimeoutError:
                self._report(socket, error=f"no answer within {ANSWER_S_MAX:g} s")
            except Exception as error:  # noqa: BLE001 - the others are to be shown nevertheless
                self._report(socket, error=words.not_understood(error))
            await asyncio.sleep(INTERVAL_S)

    async def _converse(self, socket: str) -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(ANSWER_S_MAX):
                server = await stack.enter_async_context(self._connect(socket))
            maps: dict[str, Record] = {}
            while True:
                asked = self._time_s(), self.clock()
                async with asyncio.timeout(ANSWER_S_MAX):
                    status = await server.status()
                    if not isinstance(status, dict):
                        raise NoAnswer("the server does not answer as an nbdmirror does")
                    maps = await _newer(maps, status, server)
                self._report(socket, plain(status), maps=maps, asked=asked)
                await asyncio.sleep(INTERVAL_S_MIN)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(INTERVAL_S - INTERVAL_S_MIN):
                        while not self._tell_all(socket, await server.events()):
                            pass

    def _tell_all(self, socket: str, news: list[News]) -> bool:
        """Whether there is any that has the server asked at once. One that is asked after each
        point would always be seen when its lag is smallest."""
        told = [one.text for one in news if not one.is_routine]
        for text in told:
            self._tell(socket, text)
        return bool(told)

    def _report(
        self,
        socket: str,
        status: dict[str, Any] | None = None,
        error: str = "",
        maps: dict[str, Record] | None = None,
        asked: tuple[float, float] | None = None,
    ) -> None:
        """Unless the server is there no more. `asked`: when, by both clocks; None: just now."""
        if asyncio.current_task() is not self._watching.get(socket):
            return
        before = self._reports.get(socket)
        time_s, asked_s = asked or (self._time_s(), self.clock())
        report = Report(plain(socket), time_s, status or {}, plain(error), maps or {}, asked_s)
        self._reports[socket] = report
        self.history.add(report)
        if before and before.error != report.error:
            self._tell(socket, report.error or "answers again")
        self._wake()

    def _tell(self, socket: str, text: str) -> None:
        self.history.note(plain(socket), plain(text))
        self._wake()

    def _wake(self) -> None:
        self.version += 1
        self._news.set()
        self._news = asyncio.Event()


async def _newer(
    maps: dict[str, Record], status: dict[str, Any], server: Conversation
) -> dict[str, Record]:
    """The maps of the jobs that there are, the oldest first; MAPS_MAX of them are of now."""
    names = [
        str(job.get("device", ""))
        for disk in records(status, "disks")
        for job in records(disk, "jobs")
        if job.get("status") != "concluded"
    ]
    waiting = [name for name in names if name not in maps]
    waiting += [name for name in maps if name in names]
    found = {name: maps[name] for name in maps if name in names}
    for name in waiting[:MAPS_MAX]:
        answer = plain(await server.job_map(name, MAP_CELLS))
        found.pop(name, None)
        found[name] = answer if isinstance(answer, dict) else {}
    return found
