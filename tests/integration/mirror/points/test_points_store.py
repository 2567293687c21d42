"""Where a guest's old content goes while the far side stands still: memory, a file, nowhere."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from integration.mirror.points.pointsparts import FarSide, last_point
from integration.state.stateparts import restart_until_ready
from support.clients import connected, nbd_errno
from support.fixtures import Identical, Start
from support.images import MiB, make_image
from support.kept import Kept
from support.servers import Nbdmirror
from support.waiting import wait_until

SIZE = 48 * MiB
"""More than is on its way to the far side at once, by far more than the memory."""

STORE = {"x_nbdmirror_store_bytes": MiB}


@pytest.fixture
def far(start: Start, folder: Path) -> FarSide:
    return FarSide(start, folder, ring=2 * SIZE, size=SIZE)


@pytest.fixture
def server(start: Start, folder: Path) -> Kept:
    return start(Kept(folder, make_image(folder / "disk.img", SIZE)))


def overwrite_behind_a_far_side_that_stands_still(
    server: Kept, far: FarSide, **options: object
) -> int:
    """All of a point. Returns the error of the guest's last write, or 0."""
    far.start_mirror(server, device="vda", x_nbdmirror_interval=3600, **STORE, **options)
    server.qmp.wait_ready()
    with connected(server.uri()) as guest:
        for at in range(0, SIZE, MiB):
            guest.pwrite(b"a" * MiB, at)
        os.kill(far.journal_server.pid, signal.SIGSTOP)
        try:
            server.qmp.execute("x-nbdmirror-point", id="j")
            for at in range(0, SIZE, MiB):
                if error := nbd_errno(guest.pwrite, b"b" * MiB, at):
                    return error
        finally:
            os.kill(far.journal_server.pid, signal.SIGCONT)
    return 0


def end_with_a_last_point(server: Kept, far: FarSide) -> None:
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    server.stop()
    far.stop()


def broken_points(server: Kept) -> list[str]:
    server.qmp.execute("query-status")  # hears the events
    events = (e for e in server.qmp.events if e["event"] == "X_NBDMIRROR_POINT_BROKEN")
    return [event["data"]["reason"] for event in events]


def test_what_has_no_room_in_memory_goes_to_a_file(
    server: Kept, far: FarSide, folder: Path, identical: Identical
) -> None:
    spill = {"x_nbdmirror_spill_bytes": 2 * SIZE}
    assert overwrite_behind_a_far_side_that_stands_still(server, far, **spill) == 0
    wait_until(lambda: last_point(server) > 1, "the point is committed")
    assert not broken_points(server)
    end_with_a_last_point(server, far)
    identical(folder / "disk.img", far.image)


def test_without_a_file_the_point_is_given_up(
    server: Kept, far: FarSide, folder: Path, identical: Identical
) -> None:
    """The guest goes on, and the next point has everything."""
    assert overwrite_behind_a_far_side_that_stands_still(server, far) == 0
    wait_until(lambda: broken_points(server), "the point is given up")
    assert "no room to save" in broken_points(server)[0]
    end_with_a_last_point(server, far)
    identical(folder / "disk.img", far.image)


def test_or_the_guests_write_fails(
    server: Kept, far: FarSide, folder: Path, identical: Identical
) -> None:
    server.allowed.append("no room to save what a guest overwrites")
    policy = {"on_cbw_error": "break-guest-write"}
    error = overwrite_behind_a_far_side_that_stands_still(server, far, **policy)
    assert error == errno.ENOSPC
    wait_until(lambda: last_point(server) > 1, "the point is committed")
    assert not broken_points(server)
    end_with_a_last_point(server, far)
    identical(folder / "disk.img", far.image)


def test_what_a_restart_keeps_of_it(server: Kept, far: FarSide, folder: Path) -> None:
    spill = {"x_nbdmirror_spill_bytes": 2 * SIZE, "on_cbw_error": "break-guest-write"}
    far.start_mirror(server, device="vda", **STORE, **spill)
    server.qmp.wait_ready()
    before = last_point(server)
    server.stop()
    restart_until_ready(server)
    assert last_point(server) > before
    mirror: Any = server.definition()["mirror"]
    points = mirror["points"]
    assert (points["store_bytes"], points["spill_bytes"]) == (MiB, 2 * SIZE)
    assert points["breaks_guest_writes"] is True


def test_what_is_refused(start: Start, folder: Path, far: FarSide, server: Kept) -> None:
    bare = start(Nbdmirror(folder, make_image(folder / "bare.img", SIZE), bare=True))

    def refusal(server: Nbdmirror, device: str, **arguments: object) -> str:
        points = {"copy_mode": "points", "x_nbdmirror_journal": far.journal_server.uri()}
        return server.qmp.refusal(
            "drive-mirror",
            device=device,
            target=far.image_server.uri(),
            sync="full",
            mode="existing",
            **(points | arguments),
        )

    file = {"x_nbdmirror_spill_bytes": SIZE}
    assert "needs a server with a state directory" in refusal(bare, "disk0", **file)
    bounds = "expects 1048576 to 1099511627776 bytes"
    for name in ("store", "spill"):
        for size in (-1, MiB - 1, 1 << 50):
            said = refusal(server, "vda", **{f"x_nbdmirror_{name}_bytes": size})
            assert said == f"Parameter 'x-nbdmirror-{name}-bytes' {bounds}"
    assert "break-nothing" in refusal(server, "vda", on_cbw_error="break-nothing")
    for name, value in {**STORE, **file, "on_cbw_error": "break-snapshot"}.items():
        other = {"copy_mode": "background", "x_nbdmirror_journal": None, name: value}
        given = {key: one for key, one in other.items() if one is not None}
        said = server.qmp.refusal(
            "drive-mirror", device="vda", target=far.image_server.uri(), sync="full",
            mode="existing", **given,
        )  # fmt: skip
        assert said == f"Parameter '{name.replace('_', '-')}' needs copy-mode 'points'"
