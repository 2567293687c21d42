"""A running guest moves from host A to host B, memory and disk, and does not notice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.guest import ALL_FILES, Machine, check_disk, make_disk, nbd_drive
from e2e.hosts import NBD_PORT, Hosts, NbdmirrorAt, QemuNbdAt, two_hosts
from support.fixtures import Start
from support.images import MiB, make_empty, make_noise
from support.processes import ROOT, Finished, freeze, nbdmirror, nbdmirror_environment
from support.servers import Nbdmirror
from support.waiting import WAIT_S_MAX, wait_until

pytestmark = pytest.mark.timeout(180)

MIGRATION_PORT = 4444
SLOW = 2 * MiB
"""Bytes of memory a second: time to do something meanwhile."""
FAST = 1 << 40

TargetServer = type[QemuNbdAt] | type[NbdmirrorAt]

hosts = pytest.fixture(two_hosts)


class Stage:
    """A guest that writes, on host A, and a target for its disk on host B."""

    def __init__(
        self, folder: Path, hosts: Hosts, start: Start, target_server: TargetServer = QemuNbdAt
    ) -> None:
        self.folder, self.start = folder, start
        self.stderr = folder / "handover.stderr"
        self.a, self.b = hosts
        self.source = make_disk(folder / "source.img")
        self.target_image = make_noise(folder / "target.img", self.source.stat().st_size)
        self.target = start(target_server(folder, self.target_image, self.b))
        self.state = ("--state-dir", str(folder / "state"))
        server = Nbdmirror(folder, self.source, options=self.state)
        self.server = start(self.a.place(server))
        drive = nbd_drive(str(self.server.socket), reconnect_delay=60)
        self.guest = start(self.a.place(Machine(folder, drive)))
        self.guest.say("write")
        self.guest.wait_for_files(5)

    def wait_there(self, *options: str) -> Machine:
        """A QEMU on host B that waits for the guest."""
        drive = nbd_drive(f"{self.b.address}:{NBD_PORT}")
        incoming = f"tcp:{self.b.address}:{MIGRATION_PORT}"
        machine = Machine(self.folder, drive, incoming=incoming, options=options)
        return self.start(self.b.place(machine))

    def handover_words(self, *more: str, **other: str) -> list[str]:
        options = {
            "qmp": str(self.server.qmp_path),
            "qemu": str(self.guest.monitor_path),
            "to": f"tcp:{self.b.address}:{MIGRATION_PORT}",
            "target": self.target.uri(),
        } | other
        target = options.pop("target")
        return ["handover", target, *(f"--{key}={value}" for key, value in options.items()), *more]

    def handover(self, *more: str, **other: str) -> Finished:
        return nbdmirror(*self.handover_words(*more, **other), timeout_s=60)

    def begin_handover(self) -> None:
        """It runs when this returns, and the memory is being copied, slowly."""
        self.limit_migration(SLOW)
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nbdmirror", *self.handover_words()],
                env=nbdmirror_environment(),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        wait_until(
            lambda: self.migration() == "active" or self.process.poll() is not None,
            "the memory is being copied",
        )
        assert self.process.poll() is None, self.stderr.read_text()

    def finish_handover(self) -> Finished:
        status = self.process.wait(WAIT_S_MAX)
        return subprocess.CompletedProcess("handover", status, "", self.stderr.read_text())

    def limit_migration(self, bytes_per_s: int) -> None:
        self.guest.qmp.execute("migrate-set-parameters", max_bandwidth=bytes_per_s)

    def hold_pivot(self) -> None:
        """Let the migration get as far as the pivot, which waits for the target: that hangs."""
        freeze(self.target.pid)
        self.limit_migration(FAST)
        wait_until(lambda: "stopped for the pivot" in self.stderr.read_text(), "the pivot")
        assert self.migration() == "pre-switchover"

    def migration(self) -> str:
        return str(self.guest.qmp.execute("query-migrate").get("status", "none"))

    def arrive(self, there: Machine) -> None:
        """The guest is on host B: host A goes, and the guest has all, and writes on."""
        self.guest.check()
        there.transcript = self.guest.transcript
        self.guest.stop()
        self.server.stop()
        self.is_refused_on_a()
        before = self.source.read_bytes()
        there.wait_for_files(5)
        there.verify()
        there.wait_for_files(ALL_FILES)
        check_disk(self.target_image, there.shut_down())
        assert self.source.read_bytes() == before, "written to after the pivot"

    def is_refused_on_a(self) -> None:
        """The old disk is not served any more as if it were the truth."""
        where = ("--socket", self.folder / "old.sock", "--qmp", self.folder / "old.qmp")
        line = last_line(nbdmirror("serve", self.source, *where, *self.state), 1)
        assert f"{self.source} is not the disk any more" in line
        assert f"it is served from nbd://{self.b.address}" in line

    def goes_on_here(self) -> None:
        """The guest runs on host A, its disk is on host B, and nobody writes to the old one."""
        self.guest.verify()
        before = self.source.read_bytes()
        self.guest.wait_for_files(ALL_FILES)
        assert self.source.read_bytes() == before


def last_line(done: Finished, status: int) -> str:
    """It ended with that status, and without a traceback; the line that says why."""
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.guarantee("A guest that is handed over has one disk at a time")
def test_handover(folder: Path, hosts: Hosts, start: Start) -> None:
    """With nbdmirror on both hosts; the other tests have qemu-nbd on host B."""
    stage = Stage(folder, hosts, start, NbdmirrorAt)
    there = stage.wait_there()
    done = stage.handover()
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"handed over: .* was stopped for \d+ ms\. .*\n", done.stdout)
    assert stage.migration() == "completed"
    stage.arrive(there)


def recipe() -> list[tuple[str, str, str]]:
    """The steps in docs/migration.md: who, `>` for a command or `<` for an event, and which."""
    text = (ROOT / "docs" / "migration.md").read_text()
    block = re.search(r"^```text\n(.*?)^```$", text, re.DOTALL | re.M)
    assert block
    return re.findall(r"^(nbdmirror|QEMU) ([<>]) (.*)$", block[1], re.MULTILINE)


def test_the_recipe(folder: Path, hosts: Hosts, start: Start) -> None:
    """Step by step as docs/migration.md has it; but first given up after the pivot. Then the guest
    goes on at host A with its disk on host B, and follows it later."""
    stage = Stage(folder, hosts, start)
    there = stage.wait_there()
    *steps, resume, completed = recipe()
    for step in steps:
        take(stage, step)
    stage.guest.qmp.execute("migrate_cancel")
    stage.goes_on_here()
    there.kill()
    there = stage.wait_there()
    for step in [*(step for step in steps if step[0] == "QEMU"), resume, completed]:
        take(stage, step)
    stage.arrive(there)


def take(stage: Stage, step: tuple[str, str, str]) -> None:
    who, direction, text = step
    talk = {"nbdmirror": stage.server.qmp, "QEMU": stage.guest.qmp}[who]
    what = json.loads(text.replace("HOST-B", stage.b.address))
    if direction == ">":
        talk.execute(what["execute"], **what["arguments"])
    else:
        talk.wait_for_event(what["event"], **what["data"])


@pytest.mark.guarantee("A guest that is handed over has one disk at a time")
def test_what_fails_before_the_pivot_changes_nothing(
    folder: Path, hosts: Hosts, start: Start
) -> None:
    """One thing after the other, with one guest, which writes on; and in the end it moves."""
    stage = Stage(folder, hosts, start)
    capabilities = stage.guest.qmp.execute("query-migrate-capabilities")

    def runs_here(line: str) -> None:
        for part in ("the guest continues here", f"its disk is {stage.source}"):
            assert part in line
        stage.guest.wait_for_files(3)
        assert stage.guest.qmp.execute("query-migrate-capabilities") == capabilities

    line = last_line(stage.handover(qemu=str(folder / "none")), 3)
    assert f"no QEMU at {folder / 'none'} (No such file or directory)" in line

    stage.server.allowed = ["ERROR: job disk0: the source has 67108864 bytes, the target 1048576"]
    other = start(QemuNbdAt(folder, make_empty(folder / "other", MiB), stage.b, port=10810))
    line = last_line(stage.handover(target=other.uri()), 1)
    assert "the disk has 67108864 bytes, the target 1048576" in line
    runs_here(line)

    line = last_line(stage.handover(), 1)  # nobody waits there
    assert "the migration failed: Failed to connect" in line
    assert "the mirror disk0 continues" in line
    runs_here(line)

    line = last_line(stage.handover(target=other.uri()), 1)
    assert f"mirrors disk0 to {stage.target.uri()}, not to {other.uri()}" in line

    there = stage.wait_there("-m", "256M")
    line = last_line(stage.handover(), 1)
    assert "the migration failed" in line
    runs_here(line)
    there.kill()

    there = stage.wait_there()
    stage.begin_handover()
    there.kill()
    line = last_line(stage.finish_handover(), 1)
    assert "the migration failed" in line
    runs_here(line)

    there = stage.wait_there()
    stage.begin_handover()
    stage.process.send_signal(signal.SIGINT)
    line = last_line(stage.finish_handover(), 130)
    assert "interrupted; the guest continues here" in line
    runs_here(line)
    there.kill()

    there = stage.wait_there()
    stage.limit_migration(SLOW)
    line = last_line(stage.handover("--timeout=2"), 4)
    assert "timed out after 2 s; the guest continues here" in line
    runs_here(line)
    there.kill()

    there = stage.wait_there()
    stage.begin_handover()
    stage.target.kill()
    line = last_line(stage.finish_handover(), 1)
    assert "job disk0 failed: " in line and "connection lost" in line
    assert "goes on" not in line
    runs_here(line)
    there.kill()

    stage.target.start()
    there = stage.wait_there()
    stage.limit_migration(FAST)
    assert stage.handover().returncode == 0
    stage.arrive(there)


@pytest.mark.guarantee("A guest that is handed over has one disk at a time")
def test_the_qemu_there_dies_after_the_pivot(folder: Path, hosts: Hosts, start: Start) -> None:
    """The guest goes on at host A, and its disk is on host B."""
    stage = Stage(folder, hosts, start)
    there = stage.wait_there()
    stage.begin_handover()
    stage.hold_pivot()
    there.kill()
    os.kill(stage.target.pid, signal.SIGCONT)
    line = last_line(stage.finish_handover(), 1)
    for part in (
        "the migration failed after the pivot",
        "the guest: it continues here",
        f"the disk is {stage.target.uri()} now",
    ):
        assert part in line
    stage.goes_on_here()
    check_disk(stage.target_image, stage.guest.shut_down())


@pytest.mark.guarantee("A guest that is handed over has one disk at a time")
def test_the_server_dies_at_the_pivot(folder: Path, hosts: Hosts, start: Start) -> None:
    """The guest is stopped, and waits there until there is a server again."""
    stage = Stage(folder, hosts, start)
    there = stage.wait_there()
    stage.begin_handover()
    stage.hold_pivot()
    stage.server.kill()
    line = last_line(stage.finish_handover(), 3)
    for part in (
        "did not report whether the disk was pivoted",
        "the guest is stopped",
        "migrate_cancel",
    ):
        assert part in line
    os.kill(stage.target.pid, signal.SIGCONT)
    there.kill()
    assert stage.guest.qmp.execute("query-status")["status"] == "finish-migrate"
    stage.server.start()
    stage.guest.qmp.execute("migrate_cancel")
    stage.guest.verify()
    stage.guest.wait_for_files(ALL_FILES)
    check_disk(stage.source, stage.guest.shut_down())
