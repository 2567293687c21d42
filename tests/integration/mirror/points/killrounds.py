"""A guest whose writes are numbered, a disk and its far side, and kills of either or both: what is
recovered must be what the disk held at one moment, and no older than was told.

The oracle is a log of what the guest was answered, kept outside of the server. Block n % BLOCKS is
not where write n goes: the places are random, so that a write that is missing shows.
"""

from __future__ import annotations

import math
import random
import threading
import time
from contextlib import suppress
from pathlib import Path

import nbd
from integration.mirror.points.pointsparts import (
    FarSide,
    recovered,
    wait_until_points_continue,
)
from support.clients import connected
from support.images import KiB, assert_identical
from support.kept import Kept
from support.qmpclient import Qmp
from support.waiting import wait_until

BLOCK = 4 * KiB
LOOK_S = 0.02


def content_of(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


class NumberedGuest:
    """Writes one block after the other, each with its number, until it is stopped, or its server
    ends. The log of all writes is that of the whole test."""

    def __init__(self, disk: Path, seed: int) -> None:
        self.disk = disk
        self.initial = disk.read_bytes()
        self.places: list[int] = []
        """Where write n went; the last one perhaps."""
        self.begun_s: list[float] = []
        self.answered_s: list[float] = []
        self._rng = random.Random(seed)
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def start(self, uri: str) -> None:
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, args=(uri,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Also after its server was killed: then the disk says whether the last write took
        place."""
        self._is_stopping = True
        assert self._thread is not None
        self._thread.join(30)
        assert not self._thread.is_alive(), "a write does not return"
        if len(self.places) > len(self.answered_s):
            number = len(self.answered_s)
            with self.disk.open("rb") as file:
                file.seek(self.places[-1])
                is_there = file.read(BLOCK) == content_of(number + 1)
            if is_there:
                self.answered_s.append(time.monotonic())
            else:
                del self.places[-1], self.begun_s[-1]

    def _run(self, uri: str) -> None:
        blocks = len(self.initial) // BLOCK
        with suppress(nbd.Error), connected(uri) as handle:
            while not self._is_stopping:
                self.places.append(self._rng.randrange(blocks) * BLOCK)
                self.begun_s.append(time.monotonic())
                handle.pwrite(content_of(len(self.places)), self.places[-1])
                self.answered_s.append(time.monotonic())

    def check(
        self, found: bytes, *, answered_before_s: float, begun_before_s: float = math.inf
    ) -> None:
        """`found` must be the disk of one moment, with each write that was answered before the one
        time, and none that was begun after the other. Call this while the guest is stopped, or
        with what was copied before."""
        numbers = [
            int.from_bytes(found[at : at + 8], "little") if found[at : at + BLOCK]
            == found[at : at + 8] * (BLOCK // 8) else 0
            for at in range(0, len(found), BLOCK)
        ]  # fmt: skip
        last = max((n for n in numbers if n <= len(self.places)), default=0)
        expected = bytearray(self.initial)
        for number, place in enumerate(self.places[:last], start=1):
            expected[place : place + BLOCK] = content_of(number)
        assert_identical(bytes(expected), found)
        promised = sum(at_s < answered_before_s for at_s in self.answered_s)
        assert last >= promised, f"write {promised} of {last} was promised"
        assert last <= sum(at_s < begun_before_s for at_s in self.begun_s), f"write {last} is later"


class Lag:
    """What the server says of the lag, all the while."""

    def __init__(self) -> None:
        self.promised_s = 0.0
        """Each write that was answered before this time is at the far side."""

    def watch(self, server: Kept, until: threading.Event) -> None:
        with suppress(OSError, ConnectionError), Qmp(server.qmp_path) as qmp:
            while not until.wait(LOOK_S):
                asked_s = time.monotonic()
                (disk,) = qmp.execute("x-nbdmirror-query-status")["disks"]
                for job in disk["jobs"]:
                    points = qmp.execute("query-block-jobs")[0]["x-nbdmirror-points"]
                    if "lag-s" in job and "in-place-since-s" not in points:
                        self.promised_s = max(self.promised_s, asked_s - job["lag-s"])


class Rounds:
    """`kill` and what must be so afterwards."""

    def __init__(self, server: Kept, far: FarSide, disk: Path, seed: int) -> None:
        self.server, self.far = server, far
        self.guest = NumberedGuest(disk, seed)
        self.rng = random.Random(seed)
        self.lag = Lag()

    def begin(self) -> None:
        """The guest writes, and nothing was killed yet."""

    def end(self) -> None:
        """Nothing more is killed: the mirror is to end."""

    def ended(self) -> None:
        """The mirror has ended."""

    def round(self, which: str) -> None:
        """`which`: source, far side, or both."""
        has_ended = threading.Event()
        watcher = threading.Thread(target=self.lag.watch, args=(self.server, has_ended))
        watcher.start()
        self.guest.start(self.server.uri())
        self.begin()
        before = len(self.guest.answered_s)
        writes = self.rng.randint(50, 1500)
        wait_until(lambda: len(self.guest.answered_s) >= before + writes, "the guest writes")
        is_both_in_order = self.rng.random() < 0.5
        if which != "far side" and is_both_in_order:
            self.server.kill()
        promised_s = self.lag.promised_s
        if which != "source":
            for one in self.far.servers(self.rng):
                one.kill()
        if which != "far side" and not is_both_in_order:
            self.server.kill()
        has_ended.set()
        watcher.join()
        if which == "source":  # what it has sent may still be under way there
            for one in self.far.servers(self.rng):
                one.stop()
        self.guest.stop()
        found = recovered(self.far.image, self.far.journal).read_bytes()
        self.guest.check(found, answered_before_s=promised_s)
        for one in self.far.servers(self.rng):
            one.start()
        if which != "far side":
            self.server.restart()
        wait_until_points_continue(self.server)
