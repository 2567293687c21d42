"""An applier that dies while a job ends: the job waits for another one, and whoever waits for the
job is told, by event, log and command."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from integration.mirror.points.applierparts import Applier, Command, applier_of, wait_to_follow
from integration.mirror.points.pointsparts import FarSide
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB
from support.processes import freeze, nbdmirror
from support.servers import Nbdmirror
from support.waiting import wait_until

from nbdmirror.point_sentences import APPLIER_SILENT_S

RING_BYTES = 64 * MiB

SILENT = "`nbdmirror apply` beside the image has said nothing for "
HELP = ": run it again there, or give up with: nbdmirror cancel --force"
AGAIN = "the image follows the points again"


@pytest.fixture
def far(start: Start, folder: Path) -> FarSide:
    return FarSide(start, folder, ring=RING_BYTES)


@pytest.fixture
def applier(start: Start, server: Nbdmirror, far: FarSide, folder: Path) -> Applier:
    """The mirror is ready, too."""
    far.start_mirror(server)
    server.qmp.wait_ready()
    return start(applier_of(far, folder))


def ending(server: Nbdmirror) -> str:
    (job,) = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
    return str(job["ending"])


def lose(applier: Applier, waiting: Command, server: Nbdmirror, journal: str) -> None:
    """Kill `applier`, which is frozen, while `waiting` waits for the end of the job."""
    wait_until(lambda: ending(server) != "none", "the job ends")
    applier.kill()
    told = server.qmp.wait_for_event("X_NBDMIRROR_APPLIER")
    assert told["works"] is False and told["silent-s"] >= APPLIER_SILENT_S
    assert (told["device"], told["id"]) == ("disk0", "j")
    waiting.wait_to_say(f"j: {SILENT}")
    server.wait_to_say(f"WARNING: job j: {SILENT}")
    shown = nbdmirror("points", journal).stdout
    assert "`nbdmirror apply` has made the image point" in shown or "makes the image" in shown
    assert HELP in waiting.stderr and HELP in server.stderr


def return_(applier: Applier, waiting: Command, server: Nbdmirror) -> None:
    """Another one ends what `waiting` waits for."""
    told = server.qmp.wait_for_event("X_NBDMIRROR_APPLIER")
    assert told["works"] is True and told["silent-s"] < APPLIER_SILENT_S
    server.wait_to_say(f"INFO: job j: {AGAIN}")
    assert waiting.wait_to_end() == 0
    assert waiting.stderr.count(SILENT) == waiting.stderr.count(f"j: {AGAIN}") == 1
    assert server.stderr.count(SILENT) == server.stderr.count(AGAIN) == 1


def test_it_dies_while_the_job_completes(
    start: Start,
    identical: Identical,
    server: Nbdmirror,
    far: FarSide,
    applier: Applier,
    folder: Path,
    disk: Path,
) -> None:
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        wait_to_follow(applier)
        freeze(applier.pid)
        waiting = start(Command(folder, "complete", "--qmp", server.qmp_path))
        lose(applier, waiting, server, far.journal_server.uri())
        guest.wait_for_requests(30)
        another = start(applier_of(far, folder))
        return_(another, waiting, server)
        guest.wait_for_requests(30)
    assert another.wait_to_end() == 0
    assert "job j completed" in waiting.stderr


def test_it_dies_while_the_job_is_cancelled_at_its_last_point(
    start: Start,
    identical: Identical,
    server: Nbdmirror,
    far: FarSide,
    applier: Applier,
    folder: Path,
    disk: Path,
) -> None:
    with Guest(server.uri(), disk) as guest:
        wait_to_follow(applier)
        freeze(applier.pid)
        guest.wait_for_requests(60)
    waiting = start(Command(folder, "cancel", "--qmp", server.qmp_path))
    lose(applier, waiting, server, far.journal_server.uri())
    another = start(applier_of(far, folder))
    return_(another, waiting, server)
    another.stop()
    identical(guest, disk)
    identical(guest, far.image)


def test_the_first_one_comes_to_life_again(
    start: Start,
    identical: Identical,
    server: Nbdmirror,
    far: FarSide,
    applier: Applier,
    folder: Path,
    disk: Path,
) -> None:
    """While no ending was requested, and a command waits for the end of the job."""
    waiting = start(Command(folder, "wait", "--concluded", "--qmp", server.qmp_path))
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        wait_to_follow(applier)
        freeze(applier.pid)
        told = server.qmp.wait_for_event("X_NBDMIRROR_APPLIER")
        assert told["works"] is False
        waiting.wait_to_say(f"j: {SILENT}")
        os.kill(applier.pid, signal.SIGCONT)
        told = server.qmp.wait_for_event("X_NBDMIRROR_APPLIER")
        assert told["works"] is True
        server.qmp.complete()
        guest.wait_for_requests(30)
    assert waiting.wait_to_end() == applier.wait_to_end() == 0
    assert waiting.stderr.count(SILENT) == waiting.stderr.count(f"j: {AGAIN}") == 1
