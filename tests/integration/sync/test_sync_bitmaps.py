"""sync=incremental and sync=bitmap, and jobs in a transaction: modes that qemu-storage-daemon
refuses, so that there is nothing to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from integration.sync.syncparts import SIZE, add_bitmap, marks, soft_cancel
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import assert_identical, make_image, make_noise
from support.qmpclient import Qmp
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until


@pytest.mark.parametrize(
    ("sync", "mode"),
    [("incremental", None), ("incremental", "on-success"), ("bitmap", None), ("bitmap", "never")],
)
def test_only_what_a_bitmap_has_is_copied(
    identical: Identical,
    server: Nbdmirror,
    qmp: Qmp,
    disk: Path,
    target: QemuNbd,
    sync: str,
    mode: str | None,
) -> None:
    """A full copy, a bitmap from then on, and an increment: the target is a copy again."""
    qmp.start_mirror("tgt", device="src")
    qmp.wait_ready()
    add_bitmap(qmp, granularity=4096)
    soft_cancel(qmp)
    before = target.image.read_bytes()
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x11" * 5000, 3000)
        guest.zero(70_000, 300_000)
        guest.pwrite(b"\x22", SIZE - 1)
        assert target.image.read_bytes() == before
        options = {"bitmap_mode": mode} if mode else {}
        qmp.start_mirror("tgt", device="src", sync=sync, bitmap="b", speed=1, **options)
        qmp.refusal("block-dirty-bitmap-clear", node="src", name="b")
        qmp.execute("block-job-set-speed", device="j", speed=0)
        length = qmp.wait_ready()["len"]
        assert length == 8192 + 73728 + 4096, "by the bitmap's granularity"
        guest.pwrite(b"\x33" * 4096, 500_000)  # after READY: the mirror takes it along
        soft_cancel(qmp)
    identical(disk, target.image)
    add_bitmap(qmp, "other")  # the first is idle again
    qmp.execute("block-dirty-bitmap-merge", node="src", target="other", bitmaps=["b"])


@pytest.mark.guarantee("A bitmap's increment")
@pytest.mark.parametrize("ending", ["soft cancel", "complete", "force cancel", "never", "error"])
def test_the_bitmap_is_cleared_on_success_alone(
    server: Nbdmirror, qmp: Qmp, disk: Path, target: QemuNbd, ending: str
) -> None:
    add_bitmap(qmp)
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x11" * 4096, 70_000)
        mode = {"bitmap_mode": "never"} if ending == "never" else {}
        qmp.start_mirror("tgt", device="src", sync="bitmap", bitmap="b", **mode)
        qmp.wait_ready()
        found = marks(qmp)
        assert (found["count"], found["busy"]) == (65536, True)
        if ending == "error":
            target.process.kill()  # type: ignore[union-attr]
            target.process.wait(5)  # type: ignore[union-attr]
            target.process = None
            guest.pwrite(b"\x12" * 4096, 200_000)
            assert "error" in qmp.wait_for_event("BLOCK_JOB_COMPLETED")
        elif ending == "force cancel":
            qmp.execute("block-job-cancel", device="j", force=True)
            qmp.wait_for_event("BLOCK_JOB_CANCELLED")
        elif ending == "complete":
            qmp.complete()
        else:
            soft_cancel(qmp)
    if ending == "complete":
        return  # the bitmap stays with the old node, as in QEMU: nothing to look at
    found = marks(qmp)
    expected = {"never": 65536, "force cancel": 65536, "error": 131072}.get(ending, 0)
    assert (found["count"], found["busy"], found["recording"]) == (expected, False, True)


def test_what_is_written_after_the_bitmap_job_began_is_in_the_bitmap(
    server: Nbdmirror, qmp: Qmp
) -> None:
    """Cleared is what was copied: a write that came after the last copy is not lost with it."""
    add_bitmap(qmp)
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x11" * 4096, 0)
        qmp.start_mirror("tgt", device="src", sync="bitmap", bitmap="b")
        qmp.wait_ready()
        soft_cancel(qmp)
        guest.pwrite(b"\x22" * 4096, 500_000)
    assert marks(qmp)["count"] == 65536


BITMAP_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"sync": "incremental"}, "must provide a valid bitmap name for 'incremental' sync mode"),
    ({"sync": "bitmap"}, "must provide a valid bitmap name for 'bitmap' sync mode"),
    ({"sync": "bitmap", "bitmap": "nob"}, "Bitmap 'nob' could not be found"),
    (
        {"sync": "incremental", "bitmap": "b", "bitmap_mode": "never"},
        "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
    ),
    (
        {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "always"},
        "Bitmap Sync Mode 'always' is not supported by Mirror",
    ),
    ({"sync": "full", "bitmap": "b"}, "sync mode 'full' is not compatible with bitmaps"),
    ({"sync": "none", "bitmap": "b"}, "sync mode 'none' is not compatible with bitmaps"),
    (
        {"sync": "full", "bitmap_mode": "never"},
        "Cannot specify bitmap sync mode without a bitmap",
    ),
    (
        {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "bogus"},
        "Parameter 'bitmap-mode' does not accept value 'bogus'",
    ),
    ({"sync": "bitmap", "bitmap": 1}, "Invalid parameter type for 'bitmap', expected: string"),
]


def test_errors_of_bitmap_arguments(qmp: Qmp) -> None:
    """blockdev-backup's texts, and those of the bitmap patch for mirror, which Proxmox carries."""
    add_bitmap(qmp)
    for options, text in BITMAP_ERRORS:
        arguments = {"job_id": "j", "device": "src", "target": "tgt", **options}
        assert qmp.refusal("blockdev-mirror", **arguments) == text, options
    assert qmp.execute("query-jobs") == []


def test_a_busy_bitmap_is_left_alone(qmp: Qmp, start: Start, folder: Path) -> None:
    add_bitmap(qmp)
    add_bitmap(qmp, "c")
    qmp.start_mirror("tgt", device="src", sync="bitmap", bitmap="b")
    busy = "Bitmap 'b' is currently in use by another operation and cannot be used"
    for verb in ("remove", "clear", "enable", "disable"):
        assert qmp.refusal(f"block-dirty-bitmap-{verb}", node="src", name="b") == busy
    for into, source in (("b", "c"), ("c", "b")):
        assert (
            qmp.refusal("block-dirty-bitmap-merge", node="src", target=into, bitmaps=[source])
            == busy
        )
    action = {"type": "block-dirty-bitmap-clear", "data": {"node": "src", "name": "b"}}
    assert qmp.refusal("transaction", actions=[action]) == busy
    qmp.execute("job-cancel", id="j")
    qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    qmp.execute("block-dirty-bitmap-remove", node="src", name="b")


@pytest.mark.guarantee("A bitmap's increment")
def test_an_increment_while_a_guest_writes(
    identical: Identical, server: Nbdmirror, qmp: Qmp, disk: Path, target: QemuNbd
) -> None:
    """full, then increments under load: each soft cancel leaves a copy of one moment, and the last
    one of the end."""
    with Guest(server.uri("src"), disk, connections=2, pause_s=0.002, length_max=9000) as guest:
        qmp.start_mirror("tgt", device="src")
        qmp.wait_ready()
        add_bitmap(qmp, granularity=4096)
        soft_cancel(qmp)
        for _ in range(3):
            guest.wait_for_requests(20)
            qmp.start_mirror("tgt", device="src", sync="incremental", bitmap="b")
            qmp.wait_ready()
            guest.wait_for_requests(10)
            soft_cancel(qmp)
    qmp.start_mirror("tgt", device="src", sync="incremental", bitmap="b")
    qmp.wait_ready()
    soft_cancel(qmp)
    identical(guest, target.image)


# Transactions of jobs: an extension


def test_jobs_in_a_transaction(start: Start, folder: Path) -> None:
    """All begin, or none; all complete, or none."""
    disks = [make_image(folder / f"d{n}", SIZE, n) for n in range(2)]
    targets = [start(QemuNbd(folder, make_noise(folder / f"t{n}", SIZE))) for n in range(2)]
    names = [f"d{n}={disk}" for n, disk in enumerate(disks)]
    qmp = start(Nbdmirror(folder, *names, bare=True)).qmp
    for n, target in enumerate(targets):
        qmp.add_target(f"t{n}", target)

    def begin(*pairs: tuple[int, int]) -> list[dict[str, Any]]:
        return [
            {
                "type": "blockdev-mirror",
                "data": {"job-id": f"j{d}", "device": f"d{d}", "target": f"t{t}", "sync": "full"},
            }
            for d, t in pairs
        ]

    def complete(first: str, second: str) -> list[dict[str, Any]]:
        """By either name of the command."""
        return [
            {"type": "job-complete", "data": {"id": first}},
            {"type": "block-job-complete", "data": {"device": second}},
        ]

    qmp.forget()
    assert "t9" in qmp.refusal("transaction", actions=begin((0, 0), (1, 9)))
    qmp.refusal("transaction", actions=begin((0, 0), (1, 0)))  # a target for one only
    assert qmp.steps("j0") == ["created", "aborting", "concluded", "null"]
    qmp.forget()
    qmp.execute("transaction", actions=begin((0, 0), (1, 1)))
    statuses = [(e["data"]["id"], e["data"]["status"]) for e in qmp.events if "id" in e["data"]]
    assert statuses[:4] == [
        ("j0", "created"), ("j1", "created"), ("j0", "running"), ("j1", "running")
    ]  # fmt: skip
    wait_until(lambda: all(qmp.job(job)["ready"] for job in ("j0", "j1")), "READY")
    assert qmp.refusal("transaction", actions=complete("j0", "nope"))
    assert qmp.refusal("transaction", actions=complete("nope", "j0")) == "Job not found"
    assert qmp.job("j0")["ready"]
    qmp.execute("transaction", actions=complete("j0", "j1"))
    wait_until(lambda: not qmp.execute("query-jobs"), "both have ended")
    for disk, target in zip(disks, targets, strict=True):
        assert_identical(disk, target.image)
