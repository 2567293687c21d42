"""Jobs that are kept after their end, and options without a value."""

from __future__ import annotations

import pytest
from support.fakes import URI, Fake
from unit.cli.cliparts import Main, one_line

from nbdmirror.cli import common


@pytest.fixture
def ended(fake: Fake) -> Fake:
    fake.plan["stuck"] = True
    fake.add_job("disk0", offset=400, status="concluded", error="No space left on device")
    reason = f"{URI}: No space left on device"
    fake.last = {"id": "disk0", "target": URI, "result": "failed", "reason": reason}
    return fake


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_a_job_that_has_ended_says_how(ended: Fake, run: Main, verb: str) -> None:
    status, _, err = run(verb)
    assert status == common.FAILED
    assert "has ended already (disk0: failed" in one_line(err)
    assert "No space left on device" in err and "nbdmirror dismiss" in err
    assert not [name for name, _ in ended.calls if name in ("job-pause", "job-resume")]


def test_the_status_of_a_job_that_has_ended_has_its_reason(ended: Fake, run: Main) -> None:
    assert "last job disk0: failed" in run("status")[1]
    assert f"{URI}: No space left on device" in run("status")[1]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["serve", "a", "--user", ""], "--user: is empty"),
        (["serve", "a", "--state-dir", ""], "--state-dir: is empty"),
        (["serve", ""], "DISK: is empty"),
        (["mirror", ""], "TARGET_URI: is empty"),
        (["status", "--qmp", ""], "--qmp: is empty"),
    ],
)
def test_an_empty_value_is_named_as_it_is_typed(run: Main, argv: list[str], text: str) -> None:
    status, _, err = run(*argv)
    assert (status, text in one_line(err)) == (common.USAGE, True)
