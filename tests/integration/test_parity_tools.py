"""What management tools say to a mirror job, from their public code, said to both servers.

Each has its own way to wait: libvirt by the events of the job's state, Proxmox by polling
query-block-jobs. What they read of the answers is in the transcripts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from images import MiB
from parity import assert_alike
from paritydifferences import PROGRESS, Difference, without
from paritysides import Setting, Side
from paritysteps import (
    Script,
    add,
    call,
    do,
    drive,
    fault,
    heal,
    images,
    in_sync,
    note,
    query,
    raw_node,
    ready,
    status,
    swapped,
    untold,
    write,
)
from waiting import wait_until

JOB = "copy-vda-libvirt-1-format"
LIBVIRT = {"job_id": JOB, "device": "src", "auto_finalize": True, "auto_dismiss": False}


def delete(*names: str) -> list[Any]:
    return [do("blockdev-del", node_name=name) for name in names]


def layers() -> list[Any]:
    """A storage and a format layer."""
    return [
        add("libvirt-2-storage", auto_read_only=True, discard="unmap"),
        raw_node("libvirt-2-format", "libvirt-2-storage", read_only=False, discard="unmap"),
    ]


ENDED = [status("concluded", JOB), query(), do("job-dismiss", id=JOB), query()]


@pytest.mark.parametrize("way", ["pivot", "abort", "async abort"])
def test_libvirt_copies_a_disk(folder: Path, way: str) -> None:
    """virsh blockcopy, blockjob --bandwidth, and one of --pivot and --abort. After that the layers
    that are not used any more are taken away."""
    copy = do(
        "blockdev-mirror",
        target="libvirt-2-format",
        sync="full",
        speed=65536,
        buf_size=65536,
        **LIBVIRT,
    )
    unused = ["libvirt-2-format", "libvirt-2-storage"]
    end = {
        "pivot": [do("job-complete", id=JOB), ENDED, images(), swapped(), delete("src")],
        "abort": [do("block-job-cancel", device=JOB), ENDED, images(), delete(*unused)],
        "async abort": [
            do("block-job-cancel", device=JOB, force=True),
            [ENDED, images(target=False), delete(*unused)],
        ],
    }
    script: list[Script] = [
        [layers(), copy, do("block-job-set-speed", device=JOB, speed=100 * MiB), ready(JOB)],
        [write(), in_sync(JOB), query(), end[way]],
    ]
    assert_alike(folder, Setting(), script, PROGRESS)


def test_libvirt_is_told_of_an_error(folder: Path) -> None:
    script: list[Script] = [
        [layers(), fault("target", "write", "ENOSPC")],
        [do("blockdev-mirror", target="libvirt-2-format", sync="full", **LIBVIRT), ENDED],
        [heal("target", "write"), delete("libvirt-2-format", "libvirt-2-storage")],
        [images(target=False)],
    ]
    assert_alike(folder, Setting(target="faulty", size=64 * 1024), script, PROGRESS)


def test_libvirt_migrates_a_disk(folder: Path) -> None:
    """To an NBD server, in QEMU's older form of the address; the job is cancelled when the machine
    has stopped, and the copy is good."""
    alias = "drive-virtio-disk0"
    ended = [do("block-job-cancel", device=alias), status("null", alias), query(), images()]
    script: list[Script] = [
        [drive("nbd:unix:SOCKET", job_id=alias, format="raw", speed=2**40, auto_dismiss=True)],
        [ready(alias), write(), in_sync(alias), query(), ended],
    ]
    assert_alike(folder, Setting(), script, PROGRESS)


def polled(is_so: Callable[[dict[str, Any]], bool], what: str) -> Any:
    """Proxmox's loop: every job of the type "mirror" by its `device`; one that is concluded is
    dismissed, and `error` is what the user is told."""

    def run(side: Side) -> None:
        def look() -> bool:
            jobs = [job for job in side.qmp.execute("query-block-jobs") if job["type"] == "mirror"]
            return is_so({job["device"]: job for job in jobs})

        with untold(side):
            wait_until(look, what)

    return call(f"wait until {what}", run)


DRIVE = "drive-scsi0"
IS_READY = polled(lambda jobs: bool(jobs[DRIVE]["ready"] and not jobs[DRIVE]["busy"]), "ready")
IS_CONCLUDED = polled(lambda jobs: jobs[DRIVE]["status"] == "concluded", "concluded")


def _answers(lines: list[str]) -> list[str]:
    events = without(r"^<- (JOB_STATUS_CHANGE|BLOCK_JOB_)")
    return PROGRESS.rewrite(events(lines))


ONLY_ANSWERS = Difference(
    "events between polls", "who polls reads none, and when they come is timing", _answers
)


@pytest.mark.parametrize("way", ["complete", "cancel"])
def test_proxmox_moves_or_clones_a_disk(folder: Path, way: str) -> None:
    clone = drive("nbd:unix:SOCKET", job_id=DRIVE, format="nbd", speed=10 * MiB)
    script: list[Script] = [
        [clone, IS_READY, write(), in_sync(DRIVE), query()],
        [do(f"block-job-{way}", device=DRIVE), IS_CONCLUDED, query(), do("job-dismiss", id=DRIVE)],
        [query(), images(), swapped() if way == "complete" else query()],
    ]
    assert_alike(folder, Setting(), script, ONLY_ANSWERS)


def test_proxmox_is_told_of_an_error(folder: Path) -> None:
    def tell(side: Side) -> None:
        with untold(side, events=True):
            (job,) = side.qmp.execute("query-block-jobs")
        note(side, f"{job['error']} (io-status: {job['io-status']})")

    script: list[Script] = [
        [fault("target", "write", "EIO"), drive("nbd:unix:SOCKET", job_id=DRIVE, format="nbd")],
        [IS_CONCLUDED, call("what the user is told", tell), do("job-dismiss", id=DRIVE)],
        [do("block-job-cancel", device=DRIVE), heal("target", "write"), images(target=False)],
    ]
    assert_alike(folder, Setting(target="faulty"), script, ONLY_ANSWERS)
