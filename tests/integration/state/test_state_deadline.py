"""A deadline is a moment, and not so much time: a server that is away does not move it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from integration.state.stateparts import End, begin, ends, restart_until_ready, settle
from support.fixtures import Identical
from support.images import KiB
from support.kept import Kept
from support.servers import QemuNbd
from support.waiting import wait_until


def deadline_of(server: Kept) -> dict[str, Any]:
    found = server.job_status()["x-nbdmirror-deadline"]
    assert isinstance(found, dict)
    return found


@ends
def test_it_is_the_same_moment_after_a_restart(server: Kept, target: QemuNbd, end: End) -> None:
    ours = {"x_nbdmirror_deadline": 3600, "x_nbdmirror_on_deadline": "complete"}
    begin(server, target, **ours).wait_ready()
    before = deadline_of(server)
    settle(server)
    end(server)
    restart_until_ready(server)
    after = deadline_of(server)
    assert (after["at-s"], after["on-deadline"]) == (before["at-s"], "complete")
    assert after["left-s"] < before["left-s"]


def test_one_that_passes_while_the_server_is_away(
    server: Kept, target: QemuNbd, disk: Path, identical: Identical
) -> None:
    qmp = begin(server, target, speed=64 * KiB)
    qmp.execute(
        "block-job-change",
        id="j",
        type="mirror",
        copy_mode="background",
        x_nbdmirror_deadline=0.001,
        x_nbdmirror_on_deadline="complete",
    )
    server.stop()
    qmp = server.restart()
    wait_until(lambda: "done: complete-when-ready" in server.stderr, "it is told")
    assert deadline_of(server)["outlook"] == "passed"
    qmp.execute("block-job-set-speed", device="j", speed=0)
    qmp.wait_for_event("BLOCK_JOB_COMPLETED", device="j")
    assert qmp.execute("query-block")[0]["inserted"]["file"] == target.uri()
    identical(disk, target.image)
