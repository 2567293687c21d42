"""A bitmap on the target of a running mirror has all that reaches the target from then on: a copy
of the target, made then, can be brought up to date with it."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
from integration.sync.syncparts import marks, soft_cancel
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import KiB, MiB, make_image, make_noise
from support.qmpclient import Qmp
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

SIZE = 8 * MiB
SEED = 41


@pytest.mark.parametrize(
    ("phase", "how", "copy_mode"),
    [
        *itertools.product(
            ["created", "first copy", "paused", "ready"],
            ["add", "enable", "clear"],
            ["background"],
        ),
        ("first copy", "add", "write-blocking"),
        ("ready", "add", "write-blocking"),
    ],
)
def test_a_copy_of_the_target_can_be_brought_up_to_date(
    start: Start, identical: Identical, folder: Path, phase: str, how: str, copy_mode: str
) -> None:
    disk = make_image(folder / "disk.img", SIZE)
    target = start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))
    server = start(Nbdmirror(folder, f"src={disk}", bare=True))
    qmp = server.qmp
    qmp.add_target("tgt", target)
    with Guest(server.uri("src"), disk, seed=SEED, pause_s=0.005) as guest:
        begin(qmp, phase, copy_mode, how)
        copy = Path(shutil.copy(target.image, folder / "copy.img"))
        qmp.execute("block-job-set-speed", device="j", speed=0)
        if phase == "paused":
            qmp.execute("job-resume", id="j")
        wait_until(lambda: qmp.job()["ready"], "READY")
        guest.wait_for_requests(20)
        qmp.execute("job-complete", id="j")
        qmp.wait_completed()
        guest.wait_for_requests(20)
    assert 0 < marks(qmp, node="tgt")["count"] <= SIZE
    qmp.add_target("copy", start(QemuNbd(folder, copy)))
    qmp.start_mirror("copy", device="src", sync="bitmap", bitmap="b")
    qmp.wait_ready()
    soft_cancel(qmp)
    identical(bytes(guest.model), target.image)
    identical(target.image, copy)


def begin(qmp: Qmp, phase: str, copy_mode: str, how: str) -> None:
    """A mirror whose target has a bitmap that records since `phase`."""
    mirror = {"job-id": "j", "device": "src", "target": "tgt", "sync": "full"}
    slow = {"copy-mode": copy_mode, "speed": 256 * KiB, "buf-size": 128 * KiB}
    new = {"node": "tgt", "name": "b", "disabled": how == "enable"}
    old: dict[str, object] = {"node": "tgt", "name": "b"}
    first = [("blockdev-mirror", {**mirror, **slow})]
    last: list[tuple[str, dict[str, object]]] = [("block-dirty-bitmap-add", new)]
    if how != "add":
        last.append((f"block-dirty-bitmap-{how}", old))
    if phase == "created":
        transact(qmp, first + last)
        return
    transact(qmp, first)
    wait_until(lambda: qmp.job()["offset"] > 0, "something is copied")
    if phase == "paused":
        qmp.execute("job-pause", id="j")
        qmp.wait_status("paused")
    elif phase == "ready":
        qmp.execute("block-job-set-speed", device="j", speed=0)
        qmp.wait_ready()
    transact(qmp, last)


def transact(qmp: Qmp, actions: list[tuple[str, dict[str, Any]]]) -> None:
    qmp.execute("transaction", actions=[{"type": name, "data": data} for name, data in actions])


def test_a_bitmap_of_a_target_goes_with_a_job_that_fails(start: Start, folder: Path) -> None:
    """Nothing more is recorded for it, and its name is free again."""
    disk = make_image(folder / "disk.img", MiB)
    target = start(QemuNbd(folder, make_noise(folder / "target.img", MiB)))
    qmp = start(Nbdmirror(folder, f"src={disk}", bare=True)).qmp
    qmp.add_target("tgt", target)
    b = {"node": "tgt", "name": "b"}
    idle = "Node 'tgt' is not a disk that is served here"
    assert qmp.refusal("block-dirty-bitmap-add", **b) == idle
    for _ in range(2):
        qmp.start_mirror("tgt", device="src")
        qmp.wait_ready()
        qmp.execute("block-dirty-bitmap-add", **b)
        taken = qmp.refusal("block-dirty-bitmap-add", node="src", name="b")
        assert taken == "Bitmap already exists: b"
        lasting = qmp.refusal("block-dirty-bitmap-add", node="tgt", name="c", persistent=True)
        assert lasting == "Can't store persistent bitmaps to tgt: Operation not supported"
        none = qmp.refusal("block-dirty-bitmap-clear", node="src", name="b")
        assert none == "Dirty bitmap 'b' not found"
        qmp.execute("job-cancel", id="j")
        qmp.wait_for_event("BLOCK_JOB_CANCELLED")
        assert "not found" in qmp.refusal("block-dirty-bitmap-remove", **b)
    qmp.execute("block-dirty-bitmap-add", node="src", name="b")
