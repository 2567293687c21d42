"""Until when a mirror is to have ended, with real servers: what is refused, what is said, and what
is done then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from integration.test_explain import check_everywhere, command, job_of
from support.fixtures import Identical, Start
from support.qmpclient import Refused
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.cli.common import DONE, FAILED, USAGE

SLOW = ("--speed", "32K", "--granularity", "4K")
"""A copy of two minutes."""


@pytest.fixture
def server(start: Start, disk: Path) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, f"vda={disk}"))


def deadline_of(server: Nbdmirror) -> dict[str, Any]:
    (job,) = server.qmp.execute("query-block-jobs")
    return dict(job["x-nbdmirror-deadline"])


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (("--deadline", "soon"), USAGE, "'soon' is not a time"),
        (("--deadline=-5",), USAGE, "'-5' is not a time"),
        (("--deadline", "2026-11-29T12:00"), USAGE, "is not a time"),
        (("--deadline", "9000h"), USAGE, "is more than 366 days"),
        (("--on-deadline", "explode"), USAGE, "invalid choice: 'explode'"),
        (("--on-deadline", "cancel"), FAILED, "--on-deadline needs --deadline"),
        (("--deadline", "0", "--on-deadline", "cancel"), FAILED, "--on-deadline needs --deadline"),
    ],
)
def test_what_is_refused(
    server: Nbdmirror, target: QemuNbd, options: tuple[str, ...], status: int, text: str
) -> None:
    for verb in (["mirror", target.uri()], ["change"]):
        if verb == ["change"] and status == FAILED:
            assert command(server, "mirror", target.uri()).returncode == DONE
        done = command(server, *verb, *options)
        assert (done.returncode, text in done.stderr.splitlines()[-1]) == (status, True)
        assert verb == ["change"] or server.qmp.execute("query-block-jobs") == []


@pytest.mark.parametrize("seconds", [-1, -0.001, 366 * 86400 + 1])
def test_what_is_refused_over_qmp(server: Nbdmirror, target: QemuNbd, seconds: float) -> None:
    asked = {"device": "vda", "target": target.uri(), "mode": "existing", "sync": "full"}
    with pytest.raises(Refused, match=r"'x-nbdmirror-deadline' expects a value in range"):
        server.qmp.execute("drive-mirror", **asked, x_nbdmirror_deadline=seconds)
    assert server.qmp.execute("query-block-jobs") == []


def test_a_job_that_has_ended_takes_none(server: Nbdmirror, target: QemuNbd) -> None:
    asked = {"device": "vda", "target": target.uri(), "mode": "existing", "sync": "full"}
    server.qmp.execute("drive-mirror", **asked, auto_dismiss=False)
    server.qmp.wait_ready("vda")
    server.qmp.execute("job-complete", id="vda")
    server.qmp.wait_status("concluded", "vda")
    done = command(server, "change", "--deadline", "1h")
    assert done.returncode == FAILED and "has already ended" in done.stderr


def test_it_is_shown_and_changed(
    disk: Path, server: Nbdmirror, target: QemuNbd, identical: Identical
) -> None:
    qmp = server.qmp
    begun = command(server, "mirror", target.uri(), *SLOW, "--deadline", "1h")
    assert "whether its deadline in " in begun.stdout and "is not known" in begun.stdout
    wait_until(lambda: deadline_of(server)["outlook"] == "can-be-kept", "it is predicted")
    check_everywhere(server, "can be kept")
    found = deadline_of(server)
    assert 3000 < found["left-s"] < 3600 and found["on-deadline"] == "report"
    changed = command(server, "change", "--on-deadline", "complete")
    assert changed.returncode == DONE and "; its deadline in " in changed.stdout
    assert deadline_of(server)["at-s"] == found["at-s"]
    changed = command(server, "change", "--deadline", "500ms")
    assert changed.returncode == DONE
    told = qmp.wait_for_event("X_NBDMIRROR_DEADLINE")
    assert (told["action"], told["device"], told["id"]) == ("complete", "vda", "vda")
    assert told["done"] == "complete-when-ready" and "left to copy" in told["reason"]
    check_everywhere(server, "its deadline has passed; it is completed as soon as it is ready")
    qmp.execute("block-job-set-speed", device="vda", speed=0)
    wait_until(lambda: "pivoted" in server.stderr, "it ends")
    assert "its deadline has passed: the job is in state running" in server.stderr
    identical(disk, target.image)


def test_a_deadline_that_is_taken_back(server: Nbdmirror, target: QemuNbd) -> None:
    assert command(server, "mirror", target.uri(), "--deadline", "1h").returncode == DONE
    assert command(server, "change", "--deadline", "0").returncode == DONE
    assert "x-nbdmirror-deadline" not in job_of(server)


def test_a_copy_is_cancelled(disk: Path, server: Nbdmirror, target: QemuNbd) -> None:
    qmp, before = server.qmp, disk.read_bytes()
    more = "--deadline", "1", "--on-deadline", "cancel"
    done = command(server, "mirror", target.uri(), *SLOW, *more, "--wait", "ready")
    assert done.returncode == FAILED and "its deadline has passed" in done.stderr
    assert qmp.wait_for_event("X_NBDMIRROR_DEADLINE")["done"] == "cancel-by-force"
    assert qmp.execute("query-block")[0]["inserted"]["file"] == str(disk)
    assert disk.read_bytes() == before


def test_a_ready_mirror_becomes_a_copy(
    disk: Path, server: Nbdmirror, target: QemuNbd, identical: Identical
) -> None:
    qmp = server.qmp
    assert command(server, "mirror", target.uri(), "--wait", "ready").returncode == DONE
    changed = command(server, "change", "--deadline", "5", "--on-deadline", "cancel")
    assert "its deadline " in changed.stdout
    assert qmp.wait_for_event("X_NBDMIRROR_DEADLINE")["done"] == "cancel"
    qmp.wait_for_event("BLOCK_JOB_COMPLETED")
    identical(disk, target.image)
