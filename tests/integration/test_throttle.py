"""A guest at full rate and a target that is much slower, with real servers: if a throttle is
allowed, the mirror gets ready, and ends before its deadline."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.test_explain import command, job_of
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_image, make_noise
from support.servers import NbdkitTarget, Nbdmirror
from support.waiting import wait_until

from nbdmirror.cli.common import DONE, USAGE

SIZE = 16 * MiB
DEADLINE_S = 60.0


@pytest.fixture
def size() -> int:
    return SIZE


@pytest.mark.alone
@pytest.mark.timeout(300)
def test_a_guest_at_full_rate(start: Start, folder: Path, identical: Identical) -> None:
    disk = make_noise(folder / "disk.img", SIZE)
    image = make_image(folder / "slow.img", SIZE)
    server = start(Nbdmirror(folder, f"vda={disk}"))
    slow = "rate=16M"  # bits a second: 8 s for the disk
    target = start(NbdkitTarget(folder, "file", str(image), slow, filters=("rate",)))
    guest = Guest(server.uri("vda"), disk, connections=2, pause_s=0).start()
    qmp = server.qmp
    asked = {"device": "vda", "target": target.uri(), "mode": "existing", "sync": "full"}
    ours = {"x_nbdmirror_may": ["throttle"], "x_nbdmirror_deadline": DEADLINE_S}
    qmp.execute("drive-mirror", **asked, **ours)
    told = qmp.wait_for_event("X_NBDMIRROR_CONVERGENCE", DEADLINE_S)
    assert (told["rung"], told["device"], told["id"]) == ("throttle", "vda", "vda")
    assert told["bytes-per-s"] > 0 and told["reason"] == "the copy would miss its deadline"
    job = job_of(server)
    assert job["throttle-bytes-per-s"] > 0
    assert any("the guest is throttled" in said for said in job["explanation"])
    qmp.wait_for_event("BLOCK_JOB_READY", 2 * DEADLINE_S)
    qmp.execute("job-complete", id="vda")
    qmp.wait_for_event("BLOCK_JOB_COMPLETED", 2 * DEADLINE_S)
    names = [event["event"] for event in qmp.events]
    assert "X_NBDMIRROR_PIVOTED" in names and "X_NBDMIRROR_DEADLINE" not in names
    guest.wait_for_requests(100)
    guest.stop()
    wait_until(lambda: "the guest is not throttled any more" in server.stderr, "it is told")
    qmp.execute("query-jobs")  # the events so far come before the answer
    rungs = [e["data"] for e in qmp.events if e["event"] == "X_NBDMIRROR_CONVERGENCE"]
    assert "bytes-per-s" in rungs[0] and "bytes-per-s" not in rungs[-1]
    server.stop()
    identical(guest.model, image)


def test_it_is_allowed_while_it_runs_and_taken_back(
    start: Start, folder: Path, identical: Identical
) -> None:
    disk = make_noise(folder / "disk.img", SIZE)
    image = make_image(folder / "slow.img", SIZE)
    server = start(Nbdmirror(folder, f"vda={disk}"))
    target = start(NbdkitTarget(folder, "file", str(image), "rate=16M", filters=("rate",)))
    refused = command(server, "mirror", target.uri(), "--may", "throttle,sleep")
    assert refused.returncode == USAGE and "is none of: nothing; " in refused.stderr
    guest = Guest(server.uri("vda"), disk, connections=2, pause_s=0).start()
    qmp = server.qmp  # it hears all events from here on
    assert command(server, "mirror", target.uri(), "--deadline", "1").returncode == DONE
    changed = command(server, "change", "--may", "write-blocking,throttle")
    assert "it may do: throttle, write-blocking" in changed.stdout
    qmp.wait_for_event("X_NBDMIRROR_CONVERGENCE")
    wait_until(lambda: job_of(server).get("throttle-bytes-per-s"), "the guest is throttled")
    nothing = {"copy_mode": "background", "x_nbdmirror_may": []}
    qmp.execute("block-job-change", id="vda", type="mirror", **nothing)
    assert "throttle-bytes-per-s" not in job_of(server)
    told = qmp.wait_for_event("X_NBDMIRROR_CONVERGENCE", reason="the job was changed")
    assert told["rung"] == "throttle" and "bytes-per-s" not in told
    guest.wait_for_requests(100)
    guest.stop()
    qmp.wait_ready("vda")
    qmp.execute("job-complete", id="vda")
    wait_until(lambda: "pivoted" in server.stderr, "it ends")
    identical(guest.model, image)
