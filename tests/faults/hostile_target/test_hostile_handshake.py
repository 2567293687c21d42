"""Targets whose server does what no real one does, before the first request.

Each costs its job, or its blockdev-add, one clear error, and never the server: the disk's guest
goes on, other jobs go on, memory and descriptors stay flat, and a forced cancel takes less than a
second.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from faults.hostile_target.hostileparts import (
    HANDSHAKES,
    OPEN_S,
    SIZE,
    SLACK_S,
    add,
    is_one_line,
    mirror,
    refusal,
)
from support.hostile import FLAGS, Hostile
from support.processes import nbdmirror, resources
from support.servers import Nbdmirror
from support.waiting import wait_until


def test_handshakes_that_go_wrong(server: Nbdmirror, target: Hostile) -> None:
    """One error each, in time. Nothing is left behind, and it goes as it should when that is
    over."""
    qmp, address = server.qmp, {"type": "unix", "path": str(target.socket)}
    for case, settings in HANDSHAKES.items():
        for name, value in settings.items():
            setattr(target, name, value)
        began_s = time.monotonic()
        text = refusal(
            qmp, "blockdev-add", driver="nbd", node_name="evil", server=address, open_timeout=OPEN_S
        )
        assert time.monotonic() - began_s < OPEN_S + SLACK_S, case
        assert is_one_line(text) and target.uri in text, (case, text)
        nodes = [node["node-name"] for node in qmp.execute("query-named-block-nodes")]
        assert "evil" not in nodes, case
        target.behave()
        add(qmp, target)
        qmp.execute("blockdev-del", node_name="evil")


@pytest.mark.parametrize(
    "case",
    {
        "2**63 - 1 bytes": {"size": (1 << 63) - 1},
        "no bytes": {"size": 0},
        "one byte less": {"size": SIZE - 1},
        "read-only": {"flags": FLAGS | 2},
        "no flush": {"flags": 1},
    }.items(),
    ids=lambda case: case[0],
)
def test_an_announcement_that_a_mirror_cannot_use(
    server: Nbdmirror, target: Hostile, case: tuple[str, dict[str, int]]
) -> None:
    for name, value in case[1].items():
        setattr(target, name, value)
    done = nbdmirror("mirror", target.uri, "--device", "disk0", "--qmp", server.qmp_path)
    said = done.stderr.strip()
    assert done.returncode == 1 and is_one_line(said), said
    assert [job["id"] for job in server.qmp.execute("query-jobs")] == ["bystander"]


@pytest.mark.parametrize(
    "sizes",
    [(4096, 4096, 512), (1000, 4096, 1 << 20), (0, 0, 0), (1 << 31, 1 << 31, 1 << 31),
     (1, 3000, 1 << 20), (1, (1 << 32) - 1, (1 << 32) - 1), (1, 1, 1)],
)  # fmt: skip
def test_block_sizes_that_make_no_sense(
    server: Nbdmirror, target: Hostile, sizes: tuple[int, int, int]
) -> None:
    """libnbd takes none of them for true; the mirror works, or is refused."""
    target.block_sizes = sizes
    add(server.qmp, target)
    mirror(server.qmp)
    server.qmp.wait_ready()
    server.qmp.execute("job-cancel", id="j")
    server.qmp.wait_status("concluded")
    server.qmp.execute("job-dismiss", id="j")


def test_the_smallest_largest_request(server: Nbdmirror, target: Hostile, disk: Path) -> None:
    target.block_sizes = (512, 512, 512)
    add(server.qmp, target)
    mirror(server.qmp, copy_mode="write-blocking")
    # As much as there is: the guest may write more than goes over in such requests, and then the
    # job is never ready.
    wait_until(lambda: server.qmp.job()["offset"] >= SIZE, "the disk's size was copied")
    server.qmp.execute("job-cancel", id="j")
    server.qmp.wait_status("concluded")


def test_a_close_at_each_moment_of_the_handshake(server: Nbdmirror, target: Hostile) -> None:
    """After each byte that a good server sends: an error each, and nothing is left."""
    address = {"type": "unix", "path": str(target.socket)}
    options = {"driver": "nbd", "node_name": "evil", "server": address, "open_timeout": OPEN_S}
    length, is_through = 0, False
    while not is_through:
        target.close_after = length
        text = refusal(server.qmp, "blockdev-add", **options)
        is_through = not text
        assert is_through or (is_one_line(text) and target.uri in text)
        length += 1
    assert length > 60
    assert resources(server.pid)[2] < 200
