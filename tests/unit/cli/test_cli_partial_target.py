"""What commands say of the target of a mirror that does not copy the whole disk."""

from __future__ import annotations

import pytest
from support.fakes import URI, Fake
from unit.cli.cliparts import Main

from nbdmirror.cli import common

INCREMENT = "has what sync incremental copies, and elsewhere its old content"
INCREMENT += ": a consistent copy if that was one when the bitmap began"


@pytest.mark.parametrize(
    ("sync", "words"),
    [
        ("none", "has what sync none copies, and elsewhere its old content"),
        ("incremental", INCREMENT),
    ],
)
@pytest.mark.parametrize("ending", ["cancel", "complete"])
def test_a_target_that_is_no_copy(
    fake: Fake, run: Main, sync: str, words: str, ending: str
) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j", offset=400, ready=True, status="ready", sync=sync)
    _, out, _ = run("wait", "--ready")
    assert out == f"job j is ready: the target follows the source; the target {words}\n"
    fake.plan.clear()
    status, out, _ = run(ending)
    served = "disk disk0 is served from"
    if ending == "cancel":
        assert out == f"job j ended; {URI} {words}; {served} a.img\n"
    else:
        assert out.endswith(f"; {served} {URI}; the target {words}\n")
    assert status == common.DONE
    shown = run("status")[1]
    assert shown.endswith(f"{words}\n") and "left as a copy" not in shown
