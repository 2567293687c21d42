"""What QEMU has got since 7.2, compared with qemu-storage-daemon where that has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.fixtures import Start
from support.images import MiB, assert_identical, make_image, make_noise
from support.parity import assert_alike
from support.paritydifferences import NEVER_RAN, PROGRESS
from support.paritysides import Setting
from support.paritysteps import (
    ACTIVELY_SYNCED,
    Script,
    Step,
    add,
    change,
    dismiss,
    do,
    images,
    in_sync,
    mirror,
    node,
    query,
    raw_node,
    ready,
    start,
    status,
    swapped,
    write,
)
from support.parityversions import SINCE, has
from support.servers import Nbdmirror, QemuNbd

COMPLETE = do("job-complete", id="j")


def only_with(what: str) -> None:
    if not has(what):
        version = "{}.{}".format(*SINCE[what])
        pytest.skip(f"{what}: to be compared with QEMU {version} or newer")


# block-job-change


def test_a_job_changes_to_write_blocking(folder: Path) -> None:
    """As Proxmox does before it switches to another host."""
    script: list[Script] = [
        [start(), ready(), query(), write(), in_sync(), query()],
        [change(), ACTIVELY_SYNCED, query(), change(), query()],
        [write(4096, 512), write(MiB - 100, 100), query(progress=False), in_sync(), images()],
        [COMPLETE, status("concluded"), query(progress=False), images(), swapped(), dismiss()],
    ]
    assert_alike(folder, Setting(), script, PROGRESS)


# blockdev-set-active


def set_active(active: bool, *names: str) -> list[Step]:
    if not names:
        return [do("blockdev-set-active", active=active)]
    return [do("blockdev-set-active", node_name=name, active=active) for name in names]


DELETE = do("blockdev-del", node_name="tgt")


def test_inactive_nodes(folder: Path) -> None:
    """They are no mirror's targets. What a disk is served from is always active."""
    only_with("blockdev-set-active")
    script: list[Script] = [
        [set_active(True), set_active(False), set_active(False, "src", "nope", ""), node("src")],
        [set_active(True, "src", "nope"), add(), set_active(False, "tgt", "tgt"), node("tgt")],
        [mirror(), query(), set_active(True, "tgt"), node("tgt"), DELETE],
        [add(active=False), node("tgt"), mirror(), query(), images(equal=False), DELETE],
        [add(active=False), raw_node("up", "tgt"), raw_node("up", "tgt", active=False)],
        [node("up"), node("tgt"), mirror(target="up"), set_active(True, "up"), node("up")],
        [node("tgt"), set_active(False, "tgt"), set_active(False, "up"), node("up"), node("tgt")],
        [set_active(True, "tgt"), node("up"), node("tgt"), set_active(False, "tgt")],
        [set_active(False), set_active(True), node("up"), node("tgt")],
        [mirror(target="up"), ready(), write(), in_sync(), COMPLETE, status("concluded")],
        [dismiss(), set_active(False, "up", "tgt", "src"), node("up"), node("tgt"), images()],
    ]
    assert_alike(folder, Setting(), script, NEVER_RAN)


def test_a_raw_node_and_what_is_made_with_it(folder: Path) -> None:
    only_with("blockdev-set-active")
    below: dict[str, Any] = {"node-name": "below"}
    script: list[Script] = [
        [raw_node("a", below, active=False), node("a"), node("below")],
        [set_active(True, "a"), node("a"), do("blockdev-del", node_name="a")],
        [raw_node("a", {**below, "active": False}), node("a"), node("below")],
        [raw_node("a", {**below, "active": False}, active=False), node("a"), node("below")],
        [raw_node("b", {}), node("b"), set_active(False, "below"), images(equal=False)],
    ]
    assert_alike(folder, Setting(), script)


def test_what_a_running_mirror_needs_stays_active(start: Start, folder: Path) -> None:
    """QEMU 10.0 aborts there, and 11.1 writes to a node that is inactive."""
    disk = make_image(folder / "disk.img", MiB)
    target = start(QemuNbd(folder, make_noise(folder / "target.img", MiB)))
    server = start(Nbdmirror(folder, f"src={disk}", bare=True))
    qmp = server.qmp
    qmp.add_target("tgt", target)
    inactive = {"node_name": "tgt", "active": False}
    served = {"node_name": "src", "active": False}
    qmp.execute("blockdev-set-active", **inactive)
    mirror = {"job_id": "j", "device": "src", "target": "tgt", "sync": "full"}
    refusal = "Permission 'write' unavailable on inactive node"
    assert qmp.refusal("blockdev-mirror", **mirror) == refusal
    assert qmp.execute("query-jobs") == []
    qmp.execute("blockdev-set-active", active=True)
    qmp.start_mirror("tgt", device="src")
    qmp.wait_ready()
    assert qmp.refusal("blockdev-set-active", **inactive) == "Node tgt is in use"
    refusal = "Failed to inactivate node: Operation not permitted"
    assert qmp.refusal("blockdev-set-active", **served) == refusal
    refusal = "Failed to inactivate all nodes: Operation not permitted"
    assert qmp.refusal("blockdev-set-active", active=False) == refusal
    qmp.execute("job-complete", id="j")
    qmp.wait_completed()
    qmp.execute("blockdev-set-active", **served)  # the old file
    nodes = {node["node-name"]: node for node in qmp.execute("query-named-block-nodes")}
    assert (nodes["tgt"]["active"], nodes["src"]["active"]) == (True, False)
    assert qmp.refusal("blockdev-set-active", **inactive).startswith("Failed to inactivate node")
    assert_identical(disk, target.image)


# Queries


def test_nodes_children_and_limits(folder: Path) -> None:
    script: list[Script] = [
        [add(), raw_node("up", "tgt"), node("up"), node("tgt"), node("src", image=True)],
        [node("up", image=True), node("tgt", image=True)],
    ]
    assert_alike(folder, Setting(), script)


def test_flat_blocks(start: Start, folder: Path) -> None:
    server = start(Nbdmirror(folder, f"src={make_image(folder / 'disk.img', MiB)}", bare=True))
    assert server.qmp.execute("query-block", flat=True) == server.qmp.execute("query-block")
