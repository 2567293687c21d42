"""docs/cli.md shows how to be told of events that need attention: none of these is missed, and
those of an ordinary day are not sent."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from support.processes import ROOT

from nbdmirror.qmp.results import EVENTS
from nbdmirror.qmp.schema import BOOL

ATTENTION = {
    "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_ERROR",
    "X_NBDMIRROR_DEADLINE",
    "X_NBDMIRROR_IN_PLACE",
    "X_NBDMIRROR_POINT_BROKEN",
    "X_NBDMIRROR_SOURCE_CHANGED",
    "X_NBDMIRROR_STATE_ERROR",
    "X_NBDMIRROR_TARGET_LOST",
}
ORDINARY = {
    "BLOCK_JOB_COMPLETED",  # without an `error`
    "BLOCK_JOB_PENDING",
    "BLOCK_JOB_READY",
    "JOB_STATUS_CHANGE",
    "X_NBDMIRROR_CONVERGENCE",
    "X_NBDMIRROR_PIVOTED",
    "X_NBDMIRROR_POINT",
    "X_NBDMIRROR_QUIESCE_TIMEOUT",  # the job tries again
    "X_NBDMIRROR_SIZES_DIFFER",  # a COMPLETED with an `error` follows
    "X_NBDMIRROR_TARGET_BACK",
}
EITHER = {
    "X_NBDMIRROR_APPLIER": "works",
    "X_NBDMIRROR_JOURNAL": "enough",
    "X_NBDMIRROR_KEEP": "kept",
    "X_NBDMIRROR_RPO": "kept",
}
"""Events of a promise, with the key that says whether it is kept."""


def is_sent(name: str, **data: object) -> bool:
    """Whether the recipe lets the line of `nbdmirror events --json` through."""
    text = (ROOT / "docs" / "cli.md").read_text()
    (pattern,) = re.findall(r"grep --line-buffered -E '([^']+)'", text)
    event = {"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}}
    argv = ["grep", "--line-buffered", "-E", pattern]
    line = f"{json.dumps(event)}\n"
    found = subprocess.run(argv, check=False, input=line, text=True, capture_output=True)
    return found.returncode == 0


def test_each_event_is_of_a_kind() -> None:
    assert ATTENTION | ORDINARY | set(EITHER) == set(EVENTS)


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_what_needs_attention_is_sent(name: str) -> None:
    assert is_sent(name, device="vda", id="vda")


@pytest.mark.parametrize("name", sorted(ORDINARY))
def test_what_is_ordinary_is_not_sent(name: str) -> None:
    assert not is_sent(name, device="vda", id="vda")


@pytest.mark.parametrize(("name", "key"), EITHER.items())
def test_a_promise_that_is_broken_is_sent_and_not_that_it_is_kept_again(
    name: str, key: str
) -> None:
    assert EVENTS[name].members[key].type is BOOL
    assert is_sent(name, device="vda", **{key: False})
    assert not is_sent(name, device="vda", **{key: True})


def test_a_job_that_failed_is_sent() -> None:
    assert is_sent("BLOCK_JOB_COMPLETED", device="vda", error="No space left on device")
