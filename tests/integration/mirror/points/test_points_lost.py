"""A mirror with points whose far side is lost, in whole or in parts, and comes back."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from integration.mirror.points.pointsparts import FarSide, wait_for_points
from support.fixtures import Identical, Start
from support.guests import Guest
from support.processes import freeze
from support.servers import Nbdmirror
from support.waiting import wait_until


@pytest.mark.parametrize("which", ["image", "journal", "both"])
def test_a_far_side_that_comes_back(
    start: Start, identical: Identical, server: Nbdmirror, far: FarSide, disk: Path, which: str
) -> None:
    lost = {
        "image": [far.image_server],
        "journal": [far.journal_server],
        "both": [far.image_server, far.journal_server],
    }[which]
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        far.start_mirror(server, x_nbdmirror_reconnect_delay=60)
        server.qmp.wait_ready()
        guest.wait_for_requests(30)
        for one in lost:
            one.kill()
        server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST")
        guest.wait_for_requests(30)
        for one in lost:
            one.start()
        wait_for_points(server, 2)
        server.qmp.complete()
        guest.wait_for_requests(30)
    assert guest.longest_s < 5.0


@pytest.mark.parametrize("goes_first", ["image", "journal"])
@pytest.mark.parametrize("returns", ["before the other one goes", "beside the other one"])
def test_a_far_side_that_goes_and_comes_in_parts(
    start: Start,
    identical: Identical,
    server: Nbdmirror,
    far: FarSide,
    disk: Path,
    goes_first: str,
    returns: str,
) -> None:
    """A far host that is restarted ends its servers one after the other."""
    first, second = far.image_server, far.journal_server
    if goes_first == "journal":
        first, second = second, first
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        far.start_mirror(server, x_nbdmirror_reconnect_delay=60)
        server.qmp.wait_ready()
        guest.wait_for_requests(30)
        first.kill()
        server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST", target=first.uri())
        if returns == "before the other one goes":
            first.start()
            server.qmp.wait_for_event("X_NBDMIRROR_TARGET_BACK")
            second.kill()
        else:
            second.kill()
            first.start()
        server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST", target=second.uri())
        guest.wait_for_requests(30)
        second.start()
        wait_for_points(server, 2)
        server.qmp.complete()
        guest.wait_for_requests(30)
    assert guest.longest_s < 5.0


@pytest.mark.parametrize("which", ["image", "journal"])
def test_a_far_side_that_hangs_is_told(
    identical: Identical, server: Nbdmirror, far: FarSide, disk: Path, which: str
) -> None:
    """The copier has stopped long before: its silence says nothing."""
    hung = far.image_server if which == "image" else far.journal_server
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        far.start_mirror(server)
        server.qmp.wait_ready()
        wait_for_points(server, 1)
        freeze(hung.pid)
        try:
            wait_until(lambda: job_of(server).get("target-silent-for-s"), "that it hangs is seen")
        finally:
            os.kill(hung.pid, signal.SIGCONT)
        wait_until(lambda: "target-silent-for-s" not in job_of(server), "that it answers is seen")
        server.qmp.complete()
    assert guest.longest_s < 5.0


def job_of(server: Nbdmirror) -> dict[str, Any]:
    (job,) = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
    return dict(job)
