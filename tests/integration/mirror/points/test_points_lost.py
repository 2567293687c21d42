"""A mirror with points whose far side is lost, in whole or in parts, and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.mirror.points.pointsparts import FarSide, wait_for_points
from support.fixtures import Identical, Start
from support.guests import Guest
from support.servers import Nbdmirror


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
