"""What management tools say to a mirror job, from their public code, said to both servers.

Each has its own way to wait: libvirt by the events of the job's state, Proxmox by polling
query-block-jobs. What they read of the answers is in the transcripts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.images import MiB
from support.parity import assert_alike
from support.paritydifferences import PROGRESS, Difference, without
from support.paritysides import Setting, Side
from support.paritysteps import (
    Script,
    Step,
    add,
    bitmaps,
    call,
    do,
    drive,
    fault,
    heal,
    images,
    in_sync,
    known,
    note,
    query,
    raw_node,
    ready,
    status,
    swapped,
    untold,
    write,
)
from support.waiting import wait_until

JOB = "copy-vda-libvirt-1-format"
LIBVIRT: dict[str, Any] = {
    "job_id": JOB,
    "device": "src",
    "auto_finalize": True,
    "auto_dismiss": False,
}


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
    end: dict[str, Script] = {
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


JOB_12 = "copy-vda-libvirt-1-storage"
COPY_12: dict[str, Any] = {
    **LIBVIRT,
    "job_id": JOB_12,
    "target": "libvirt-2-storage",
    "replaces": "src",
    "sync": "full",
}
LOOK_12 = do("query-named-block-nodes", flat=True)
ENDED_12 = [status("concluded", JOB_12), do("query-jobs"), do("job-dismiss", id=JOB_12)]


@pytest.mark.parametrize("way", ["pivot", "abort"])
def test_libvirt_12_copies_a_disk(folder: Path, way: str) -> None:
    """A raw disk is one node there. With --synchronous-writes, and --target-is-zero where QEMU has
    it. Before the pivot the target gets a bitmap, lest a write be missed."""
    add_bitmap = {
        "type": "block-dirty-bitmap-add",
        "data": {
            "node": "libvirt-2-storage",
            "name": "libvirt-tmp-activewrite",
            "persistent": False,
            "disabled": False,
        },
    }
    synchronous = {"copy_mode": "write-blocking", "speed": 10 * MiB, "buf_size": 65536}
    copy = {**COPY_12, **synchronous, **known({"target-is-zero": True})}
    drained = do("transaction", actions=[add_bitmap])
    new, old = "libvirt-2-storage", "src"
    end: dict[str, Script] = {
        "pivot": [drained, do("job-complete", id=JOB_12), ENDED_12, LOOK_12, delete(old)],
        "abort": [do("block-job-cancel", device=JOB_12), ENDED_12, delete(new)],
    }
    script: list[Script] = [
        [LOOK_12, add(new, read_only=False), do("blockdev-mirror", **copy), ready(JOB_12)],
        [do("block-job-set-speed", device=JOB_12, speed=20 * MiB), LOOK_12, write(), write(4096)],
        [in_sync(JOB_12), query(), end[way], images()],
        [swapped(), bitmaps(new)] if way == "pivot" else [bitmaps()],
    ]
    assert_alike(folder, Setting(target_content="empty"), script, PROGRESS)


def test_libvirt_activates_all_nodes(folder: Path) -> None:
    """As for a copy of a machine that has arrived, and is not running yet."""
    assert_alike(folder, Setting(), [[add(), do("blockdev-set-active", active=True), query()]])


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


def polled(is_so: Callable[[dict[str, Any]], bool], what: str) -> Step:
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


def is_ready(job: str) -> Step:
    return polled(lambda jobs: bool(jobs[job]["ready"] and not jobs[job]["busy"]), "ready")


def is_concluded(job: str) -> Step:
    return polled(lambda jobs: jobs[job]["status"] == "concluded", "concluded")


IS_READY, IS_CONCLUDED = is_ready(DRIVE), is_concluded(DRIVE)


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


JOB_9 = "mirror-scsi0"
NODE_9 = "e4f1dcc3fb5fe1bd0d6a7a2d5b6e5f3"
NODE_OPTIONS_9: dict[str, Any] = {
    "export": "",
    "cache": {"direct": True, "no-flush": False},
    "discard": "unmap",
    "detect_zeroes": "unmap",
    "read_only": False,
}


@pytest.mark.parametrize("way", ["complete", "cancel"])
def test_proxmox_9_moves_or_clones_a_disk(folder: Path, way: str) -> None:
    """By blockdev-mirror, from machines of QEMU 10.0 on. What is not used any more is detached,
    with the nodes below it that it has told of."""

    def detach(name: str) -> Step:
        def run(side: Side) -> None:
            nodes = {node["node-name"]: node for node in side.qmp.execute(LIST_NODES)}
            left = [name]
            while left:
                gone = left.pop()
                side.qmp.execute("blockdev-del", node_name=gone)
                children = nodes[gone].get("children", [])
                left += [child["node-name"] for child in children if child["child"] == "file"]

        return call(f"detach {name}", run)

    ends = {"complete": do("job-complete", id=JOB_9), "cancel": do(CANCEL, device=JOB_9)}
    start = do(
        "blockdev-mirror",
        device="src",
        target=NODE_9,
        sync="full",
        auto_dismiss=False,
        speed=100 * MiB,
        job_id=JOB_9,
        replaces="src",
    )
    script: list[Script] = [
        [do(LIST_NODES), add(NODE_9, **NODE_OPTIONS_9), start, is_ready(JOB_9), write()],
        [in_sync(JOB_9), query(), ends[way], is_concluded(JOB_9), do("job-dismiss", id=JOB_9)],
        [detach("src" if way == "complete" else NODE_9), query(), images()],
        [swapped() if way == "complete" else write(4096)],
    ]
    assert_alike(folder, Setting(), script, ONLY_ANSWERS)


LIST_NODES = "query-named-block-nodes"
CANCEL = "block-job-cancel"


def test_proxmox_9_migrates_a_disk(folder: Path) -> None:
    """The job is switched to write-blocking before the machine's state goes over."""
    synced = polled(lambda jobs: jobs[DRIVE].get("actively-synced", True), "actively synced")
    change = do("block-job-change", id=DRIVE, type="mirror", copy_mode="write-blocking")
    script: list[Script] = [
        [drive("nbd:unix:SOCKET", job_id=DRIVE, format="nbd"), IS_READY, write(), change, synced],
        [write(4096), write(65536, 512), in_sync(DRIVE), query(), do(CANCEL, device=DRIVE)],
        [IS_CONCLUDED, query(), do("job-dismiss", id=DRIVE), images()],
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
