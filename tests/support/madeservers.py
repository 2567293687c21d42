"""The HTTP server in a thread of this process, with servers that are made up, and its clients."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

from hypothesis import strategies as st
from support.waiting import POLL_S, WAIT_S_MAX, wait_until

from nbdmirror.web import service
from nbdmirror.web.host import News, NoAnswer

_PARTS = {
    "source-read": 0.1,
    "target-write": 0.2,
    "target-flush": 0.0,
    "speed-limit": 0.0,
    "yielding": 0.0,
    "acknowledgement": 0.0,
    "nothing-to-do": 0.7,
    "paused": 0.0,
    "error": 0.0,
    "reconnecting": 0.0,
}
WAITS: dict[str, Any] = {
    "now": "nothing-to-do",
    "last-minute": _PARTS,
    "since-start": _PARTS,
    "seconds": {cause: 1000 * part for cause, part in _PARTS.items()},
}

JOB: dict[str, Any] = {
    "device": "vda",
    "status": "ready",
    "ready": True,
    "paused": False,
    "io-status": "ok",
    "type": "mirror",
    "len": 1 << 30,
    "offset": (1 << 30) - (3 << 16),
    "speed": 0,
    "target": "nbd://backup/vda",
    "sync": "full",
    "copy-mode": "background",
    "actively-synced": False,
    "dirty-bytes": 1 << 16,
    "unflushed-bytes": 2 << 20,
    "in-flight-bytes": 2 << 16,
    "copied-bytes": 1 << 31,
    "written-bytes": 1 << 30,
    "sent-bytes": 12 << 20,
    "changed-bytes": 10 << 20,
    "again-bytes": 0,
    "ending": "none",
    "quiesce-timeouts": 0,
    "target-connected": True,
    "falling-behind": False,
    "copy-bytes-per-s": 5 << 20,
    "zero-bytes-per-s": 0,
    "dirty-bytes-per-s": 4 << 20,
    "left-s": 1.5,
    "lag-s": 0.25,
    "waits": WAITS,
}
PROMISES: dict[str, Any] = {
    "left-s-min": 1.0,
    "left-s-max": 2.5,
    "max-pause-ms": 20.0,
    "pause-predicted-ms": 1.5,
    "throttle-bytes-per-s": 3 << 20,
    "x-nbdmirror-deadline": {
        "at-s": 1_700_000_600.0,
        "left-s": 600.0,
        "on-deadline": "report",
        "outlook": "can-be-kept",
    },
}
"""What a job has that was asked for an end."""

POINTS: dict[str, Any] = {
    "copy-mode": "points",
    "journal": "nbd://backup/vda-journal",
    "journal-connected": True,
    "x-nbdmirror-points": {
        "interval-s": 1.0,
        "keep-s": 60.0,
        "kept": True,
        "rpo-s": 10.0,
        "in-place-since-s": 1_699_999_000.0,
        "late-cuts": 2,
        "journal-bytes": 1 << 30,
        "journal-used-bytes": 1 << 20,
        "journal-point-bytes": 1 << 29,
        "image-point": 811,
        "applier-silent-s": 0.5,
        "journal-enough": True,
        "journal-lasts-s": 900.9,
        "change-bytes-per-s": 1 << 19,
        "points": 60,
        "reaches-s": 59.5,
        "sequence": 812,
        "time-s": 1_699_999_999.0,
        "bytes": 1 << 16,
    },
}
"""What a job with points has."""


def disk(name: str = "vda", *jobs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "source": f"/srv/{name}.img",
        "size": 1 << 30,
        "read-only": False,
        "connected": True,
        "lasting": True,
        "bitmaps": [],
        "requests": [
            {
                "kind": "write",
                "seconds": 0.5,
                "buckets": [1, 2, 3],
                "own-seconds": 0.25,
                "own-buckets": [3, 3],
            }
        ],
        "held": [{"cause": "cut", "seconds": 0.25, "buckets": [0, 1]}],
        "jobs": list(jobs),
        **{key.replace("_", "-"): value for key, value in more.items()},
    }


def status(*disks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "package": "nbdmirror 0.1.0",
        "pid": 812,
        "started-at-s": 1_700_000_000.5,
        "disks": list(disks),
        **{key.replace("_", "-"): value for key, value in more.items()},
    }


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
_KEYS = sorted(
    {*status(), *disk(), *JOB, "last-job", "problem", "state-problem", "state-error", "last-error"}
)
_TIMES = ("kind", "seconds", "buckets", "own-seconds", "own-buckets")
_STRANGE = st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=4)
_STRANGE_TIMES = st.dictionaries(st.sampled_from(_TIMES), _JSON)
_AS_USUAL = object()
_LIST = st.just(_AS_USUAL) | _JSON


@st.composite
def any_status(draw: st.DrawFn) -> dict[str, Any]:
    """A server's, in which anything may be something else."""

    def perhaps(usual: Any) -> Any:
        found = draw(_LIST)
        return usual if found is _AS_USUAL else found

    job, one = JOB | draw(_STRANGE), disk() | draw(_STRANGE)
    one["jobs"] = perhaps([job])
    times = disk()["requests"][0] | draw(_STRANGE_TIMES)
    one["requests"] = perhaps([times, times])
    said = status() | draw(_STRANGE)
    said["disks"] = perhaps([one])
    return said


async def until(is_so: Callable[[], bool]) -> None:
    """What a test's thread sees to."""
    while True:
        if is_so():
            return
        await asyncio.sleep(POLL_S)


class Made:
    """A server: what it says, or an error that there is no answer; `asked` counts the questions."""

    def __init__(self, says: Any) -> None:
        self.says = says
        self.asked = 0
        self.is_silent = False
        self.maps: dict[str, Any] = {}
        """By the jobs' names."""
        self.asked_maps: list[str] = []
        self.unread: list[str] = []
        self.routine: set[str] = set()
        """Those of `unread` that are."""
        self.is_listened_to = False

    async def status(self) -> Any:
        self.asked += 1
        await until(lambda: not self.is_silent)
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    async def job_map(self, job: str, cells: int) -> Any:
        self.asked_maps.append(job)
        return self.maps.get(job, {})

    async def events(self) -> list[News]:
        self.is_listened_to = True
        try:
            await until(lambda: bool(self.unread))
        finally:
            self.is_listened_to = False
        unread, self.unread = self.unread, []
        return [News(text, text in self.routine) for text in unread]


class Serving:
    """On a free port of the loopback interface. `servers`: by the names of their sockets."""

    def __init__(self, servers: dict[str, Made], *, is_loopback: bool = True) -> None:
        self.servers = servers
        self._is_loopback = is_loopback
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self._task, "it serves")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.get_loop().call_soon_threadsafe(self._task.cancel)
        self._thread.join(WAIT_S_MAX)
        assert not self._thread.is_alive()
        self.listener.close()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._task = asyncio.current_task()
        await service.serve(
            [self.listener],
            find=lambda: list(self.servers),
            connect=self._connect,
            is_loopback=self._is_loopback,
        )

    @contextlib.asynccontextmanager
    async def _connect(self, name: str) -> AsyncIterator[Made]:
        if name not in self.servers:
            raise NoAnswer(f"no server at {name}")
        yield self.servers[name]

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        return get(self.port, path, method, **headers)

    def json(self, path: str) -> Any:
        return json.loads(self.get(path)[1])

    def connection(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), WAIT_S_MAX)


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    """The status of an answer, and its text."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S_MAX)
    try:
        client.request(method, path, headers=headers)
        answer = client.getresponse()
        return answer.status, answer.read().decode()
    finally:
        client.close()
