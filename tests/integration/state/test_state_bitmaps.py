"""Persistent bitmaps (--state-dir) over orderly ends, killed processes and power cuts."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from integration.state.stateparts import GRANULE, End, begin, ends
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import MiB
from support.kept import Kept, power_cut
from support.processes import freeze
from support.qmpclient import Qmp
from support.servers import Nbdmirror, QemuNbd
from support.waiting import InThread, wait_until


def add(qmp: Qmp, name: str = "b", **options: object) -> None:
    qmp.execute(
        "block-dirty-bitmap-add", node="vda", name=name, granularity=GRANULE, persistent=True,
        **options,
    )  # fmt: skip


def bitmaps(server: Kept) -> dict[str, dict[str, object]]:
    nodes = server.qmp.execute("query-named-block-nodes")
    found = next(n for n in nodes if n["node-name"] == "vda").get("dirty-bitmaps", [])
    return {bitmap["name"]: bitmap for bitmap in found if "name" in bitmap}


@pytest.mark.guarantee("Persistent bitmaps")
@ends
def test_persistent_bitmaps_are_there_again(server: Kept, end: End) -> None:
    qmp = server.qmp
    add(qmp)
    add(qmp, "off", disabled=True)
    qmp.execute("block-dirty-bitmap-add", node="vda", name="gone")
    with connected(server.uri()) as guest:
        guest.pwrite(b"x", 5 * MiB)
        guest.zero(GRANULE, 7 * MiB)
        guest.trim(GRANULE, 9 * MiB)
    before = bitmaps(server)
    assert before["b"]["persistent"] and before["b"]["count"] == 3 * GRANULE
    end(server)
    server.restart()
    after = bitmaps(server)
    assert set(after) == {"b", "off"}
    count = int(str(after["b"]["count"]))
    assert count == 3 * GRANULE or (end is power_cut and 3 * GRANULE < count <= 3 * MiB)
    assert not after["off"]["recording"]
    assert after["off"]["count"] == 0 or end is power_cut


@pytest.mark.guarantee("Persistent bitmaps")
@ends
def test_an_increment_after_a_restart(
    identical: Identical, start: Start, folder: Path, server: Kept, disk: Path, end: End
) -> None:
    """The copy is brought up to date with what was written since, over a restart in between."""
    copy = folder / "copy.img"
    shutil.copyfile(disk, copy)
    add(server.qmp)
    with connected(server.uri()) as guest:
        for number in range(20):
            guest.pwrite(bytes([number + 1]) * 5000, number * 1_500_000)
    end(server)
    qmp = server.restart()
    target = start(QemuNbd(folder, copy))
    qmp.add_target("t", target)
    qmp.start_mirror("t", device="vda", sync="bitmap", bitmap="b")
    qmp.wait_ready()
    qmp.execute("block-job-cancel", device="j")
    qmp.wait_completed()
    assert bitmaps(server)["b"]["count"] == 0
    identical(disk, copy)


@pytest.mark.guarantee("Persistent bitmaps")
def test_commands_about_bitmaps_are_kept_when_they_are_answered(server: Kept) -> None:
    qmp = server.qmp
    for name in ("a", "b", "c"):
        add(qmp, name)
    with connected(server.uri()) as guest:
        guest.pwrite(b"x", 0)
    qmp.execute("block-dirty-bitmap-disable", node="vda", name="a")
    qmp.execute("block-dirty-bitmap-clear", node="vda", name="b")
    qmp.execute("block-dirty-bitmap-merge", node="vda", target="b", bitmaps=["a"])
    qmp.execute("block-dirty-bitmap-remove", node="vda", name="c")
    qmp.execute("block-dirty-bitmap-enable", node="vda", name="a")
    power_cut(server)
    server.restart()
    found = bitmaps(server)
    assert set(found) == {"a", "b"} and found["a"]["recording"]
    assert int(str(found["b"]["count"])) >= GRANULE


def test_a_guests_write_that_hangs_does_not_keep_control_waiting(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path
) -> None:
    """What bitmaps have is put on disk when the writes under way have ended; those that wait for a
    target that hangs do not, and the client that is to cancel the job must be answered."""
    qmp = begin(server, target, copy_mode="write-blocking")
    qmp.wait_ready()
    with connected(server.uri()) as guest:
        freeze(target.pid)
        try:
            write = InThread(lambda: guest.pwrite(b"x" * GRANULE, MiB))
            wait_until(lambda: server.job_status()["in-flight-bytes"], "the write is under way")
            name = {"node": "vda", "name": "b", "persistent": True}
            text = qmp.refusal("block-dirty-bitmap-add", **name)
            told, _, why = text.partition(": ")
            assert told == "The change is active but could not be saved"
            assert why == "guests' writes in flight do not end"
            assert set(bitmaps(server)) == {"b"}
            qmp.execute("block-job-cancel", device="j", force=True)
            qmp.wait_status("null")
            write.result()
        finally:
            os.kill(target.pid, signal.SIGCONT)
        qmp.execute("block-dirty-bitmap-clear", node="vda", name="b")
        guest.pwrite(b"y", 0)
    server.kill()
    server.restart()
    assert bitmaps(server)["b"]["count"] == GRANULE
    begin(server, target).wait_ready()
    server.qmp.complete()
    identical(disk, target.image)


def test_without_a_state_directory_bitmaps_are_refused_as_by_qemu(
    start: Start, folder: Path, disk: Path
) -> None:
    qmp = start(Nbdmirror(folder, f"vda={disk}")).qmp
    text = qmp.refusal("block-dirty-bitmap-add", node="vda", name="b", persistent=True)
    assert text == "Can't store persistent bitmaps to vda: Operation not supported"
