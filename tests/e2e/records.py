"""A Linux guest with ext4 and a database that records numbers, on a disk with points; and kills.

What the guest was answered is what it says on its console. What is recovered must be a file system
and a database as after a power cut: whole, with each record that was told of before the promised
moment, and with none that the disk did not have when it was left.
"""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

from e2e.guest import DISK_BYTES, Machine, make_disk, nbd_drive
from integration.mirror.points.killrounds import Lag
from integration.mirror.points.pointsparts import (
    FarSide,
    recovered,
    wait_until_points_continue,
)
from support.fixtures import Start
from support.images import MiB
from support.kept import Kept
from support.processes import freeze, run
from support.waiting import wait_until

RECORDED = re.compile(r"guest: recorded (\d+)\n")
RECORDS_A_ROUND = 20, 300
RING_BYTES = 64 * MiB
FIRST_RECORD_S_MAX = 60.0


class Recorder:
    """The guest's database, as far as the guest has told of it."""

    def __init__(self, guest: Machine) -> None:
        self.guest = guest
        self._told: list[tuple[float, int]] = []
        """When it was heard that all records up to this one are on the disk."""
        self._heard = 0

    def look(self) -> int:
        """The last record that was told of."""
        self.guest.check()
        numbers = RECORDED.findall(self.guest.transcript, self._heard)
        if numbers:
            self._heard = self.guest.transcript.rindex("guest: recorded")
            self._told.append((time.monotonic(), int(numbers[-1])))
        return self._told[-1][1] if self._told else 0

    def wait_for(self, more: int, timeout_s: float = FIRST_RECORD_S_MAX) -> None:
        goal = self.look() + more
        wait_until(lambda: self.look() >= goal, f"record {goal}", timeout_s)

    def told_before(self, moment_s: float) -> int:
        return max((number for at_s, number in self._told if at_s < moment_s), default=0)


def recorded(image: Path) -> int:
    """The last record on a disk that was left at this moment. The file system is brought up as at
    a boot, and then checked; the database too."""
    copy = image.with_name(f"{image.name}.check")
    run("cp", "--sparse=always", image, copy)
    done = run("e2fsck", "-p", copy, check=False)
    assert done.returncode in (0, 1), done.stdout
    run("e2fsck", "-f", "-n", copy)
    files = copy.with_name(f"{copy.name}.files")
    files.mkdir()
    run("debugfs", "-R", f"rdump /records {files}", copy)
    last = check_database(files / "records" / "db")
    shutil.rmtree(files)
    copy.unlink()
    return last


def check_database(path: Path) -> int:
    """Its last record. Each record is there, whole, up to that one."""
    with closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        ((last,),) = database.execute("SELECT number FROM last").fetchall()
        found = database.execute("SELECT number, content FROM records ORDER BY number").fetchall()
    assert found == [(number, f"{number} " * 99) for number in range(1, last + 1)]
    return int(last)


class RecordRounds:
    """A guest that lives through the kills of its server, until it is killed itself."""

    def __init__(self, start: Start, folder: Path, *, seed: int, journal: str) -> None:
        self.rng = random.Random(seed)
        self.disk = make_disk(folder / "disk.img")
        self.far = FarSide(start, folder, ring=RING_BYTES, size=DISK_BYTES)
        self.server = start(Kept(folder, self.disk))
        self.server.allowed.append(".*")  # nbdkit complains of guests that it ends on
        self.far.start_mirror(self.server, device="vda", x_nbdmirror_reconnect_delay=60)
        self.server.qmp.wait_ready()
        drive = nbd_drive(str(self.server.socket), reconnect_delay=60)
        self.guest = start(Machine(folder, drive, words=f"disk=vda journal={journal}"))
        self.guest.say("record")
        self.recorder = Recorder(self.guest)
        self.lag = Lag()

    def round(self, which: str) -> None:
        """`which`: server, far side first, or guest and all."""
        has_ended = threading.Event()
        watcher = threading.Thread(target=self.lag.watch, args=(self.server, has_ended))
        watcher.start()
        self._wait_for_a_promise()
        self.recorder.wait_for(self.rng.randint(*RECORDS_A_ROUND))
        if which == "guest and all":
            self.guest.kill()
        if which == "far side first":
            for one in self.far.servers(self.rng):
                freeze(one.pid)  # so that points that were begun go no further
            self.recorder.wait_for(self.rng.randint(1, 50))
        promised = self._promised()
        self.server.kill()
        for one in self.far.servers(self.rng):
            if which == "server":
                one.stop()  # what was sent may still be under way there
            else:
                one.kill()
        has_ended.set()
        watcher.join()
        found = recorded(recovered(self.far.image, self.far.journal))
        last = recorded(self.disk)
        assert promised <= found <= last, f"{promised} promised, {found} of {last} recovered"
        if which != "guest and all":
            assert self.recorder.look() <= last, "told of, and not on the disk"
            self._go_on()

    def _promised(self) -> int:
        return self.recorder.told_before(self.lag.promised_s)

    def _wait_for_a_promise(self) -> None:
        """Until more is promised than the round before has shown."""
        before = self.recorder.look()
        wait_until(
            lambda: self.recorder.look() and self._promised() > before,
            "points have the guest's records",
            FIRST_RECORD_S_MAX,
        )

    def _go_on(self) -> None:
        for one in self.far.servers(self.rng):
            one.start()
        self.server.restart()
        wait_until_points_continue(self.server)
