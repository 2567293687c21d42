"""A job's map is that of its disk: what is copied moves, holes are known, and the end ends it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import KiB, MiB, make_noise
from support.qmpclient import Qmp
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

SIZE = 8 * MiB
MAP = "x-nbdmirror-query-job-map"
SLOW: dict[str, Any] = {"speed": 64 * KiB, "buf_size": 64 * KiB}


@pytest.fixture
def disk(folder: Path) -> Path:
    """Its second half is a hole."""
    path = make_noise(folder / "disk.img", SIZE // 2)
    os.truncate(path, SIZE)
    return path


@pytest.fixture
def server(start: Start, disk: Path) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, disk))


@pytest.fixture
def target(start: Start, folder: Path) -> QemuNbd:
    return start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))


def shown(qmp: Qmp, cells: int = 8) -> dict[str, list[int]]:
    return dict(qmp.execute(MAP, id="j", cells=cells))


def status(qmp: Qmp) -> dict[str, Any]:
    return dict(qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"][0])


def test_from_the_start_to_the_end(
    server: Nbdmirror, target: QemuNbd, disk: Path, identical: Identical
) -> None:
    qmp = server.qmp
    qmp.start_mirror(target.uri(), **SLOW)
    wait_until(lambda: qmp.job()["offset"] > 0, "something was sent")
    qmp.execute("job-pause", id="j")
    qmp.wait_status("paused")
    found, job = shown(qmp), status(qmp)
    assert found["lengths"] == [MiB] * 8
    assert sum(found["dirty"]) == job["dirty-bytes"] > SIZE // 2
    assert found["dirty"][7] == MiB, "from the disk's beginning to its end"
    assert sum(found["in-flight"]) == 0, "it is paused"
    # A range counts as not flushed from the moment at which it is taken, also if the pause gives it
    # back before it is sent.
    assert sum(found["unflushed"]) == job["unflushed-bytes"] >= SIZE - job["dirty-bytes"] > 0
    qmp.execute("block-job-set-speed", device="j", speed=0)
    qmp.execute("job-resume", id="j")
    qmp.wait_ready()
    wait_until(lambda: sum(shown(qmp)["unflushed"]) == 0, "all is flushed")
    found = shown(qmp)
    assert sum(found["dirty"]) == sum(found["in-flight"]) == 0
    assert found["zero"] == [0] * 4 + [MiB] * 4
    with connected(server.uri()) as guest:
        guest.pwrite(b"x" * 4096, SIZE - MiB)
    wait_until(lambda: shown(qmp)["zero"] == [0] * 4 + [MiB] * 3 + [MiB - 64 * KiB], "no hole now")
    qmp.execute("block-job-cancel", device="j")
    qmp.wait_for_event("BLOCK_JOB_COMPLETED")
    identical(disk, target.image)


def test_what_is_refused(server: Nbdmirror, target: QemuNbd) -> None:
    qmp = server.qmp
    assert "Job not found" in qmp.refusal(MAP, id="j", cells=1)
    qmp.start_mirror(target.uri(), auto_dismiss=False, **SLOW)
    for cells in (0, -1, 257):
        text = "Parameter 'cells' expects a value in range [1, 256]"
        assert qmp.refusal(MAP, id="j", cells=cells) == text
    assert len(shown(qmp, 256)["lengths"]) == SIZE // (64 * KiB), "no more cells than granules"
    assert shown(qmp, 1)["lengths"] == [SIZE]
    qmp.execute("job-cancel", id="j")
    qmp.wait_status("concluded")
    assert qmp.refusal(MAP, id="j", cells=1) == "Job 'j' in state 'concluded' has no map"
