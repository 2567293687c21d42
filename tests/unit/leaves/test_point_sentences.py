"""What is said of the points of a job: how long an outage the journal survives is never said too
long, and what is advised is of use."""

from __future__ import annotations

from typing import Any

import pytest
from support.images import MiB
from support.madeservers import JOB, POINTS

from nbdmirror.explanation import explanation

OF_POINTS = POINTS["x-nbdmirror-points"]


def job(*, left_bytes: int = 0, points: dict[str, Any] | None = None, **more: Any) -> Any:
    """`points`: None as a value removes the key."""
    there = {key: value for key, value in (OF_POINTS | (points or {})).items() if value is not None}
    del there["in-place-since-s"]
    sizes = {"offset": 0, "len": left_bytes}
    return JOB | {"copy-mode": "points", "x-nbdmirror-points": there} | sizes | more


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ({}, "; it has room for an outage of 15:00 while guests change 512 KiB/s"),
        (
            {"journal-lasts-s": None, "change-bytes-per-s": 0},
            "; it has room for an outage in which guests change 512 MiB; now they change nothing",
        ),
        ({"journal-lasts-s": None, "change-bytes-per-s": None}, " of its journal are used"),
    ],
)
def test_how_long_an_outage_the_journal_survives(points: dict[str, Any], words: str) -> None:
    """15:00.9 is not 15:01."""
    (said,) = explanation(job(points=points))
    assert said.startswith("the far side has point 812, whatever is lost; 1 MiB of 1 GiB")
    assert said.endswith(words)


def test_a_point_that_takes_much_of_the_journal() -> None:
    assert len(explanation(job(left_bytes=256 * MiB))) == 1
    said = explanation(job(left_bytes=300 * MiB, points={"journal-lasts-s": 61.9}))[1]
    assert said.startswith("the next point takes 300 MiB, and the journal has room for 512 MiB: in")
    assert "in 1:01 it will not fit any more; check the far side" in said
    said = explanation(job(left_bytes=600 * MiB, points={"journal-lasts-s": 0.0}))[1]
    assert said.endswith("600 MiB, and the journal has room for 512 MiB: it does not fit")


def test_what_helps_if_a_point_does_not_fit() -> None:
    """To resume such a job is of no use: the next point is larger."""
    stopped: dict[str, Any] = {"io-status": "nospace", "status": "standby", "paused": True}
    stopped |= {"last-error": {"operation": "write", "action": "stop", "reason": "no room"}}
    said = " ".join(explanation(job(left_bytes=600 * MiB, **stopped)))
    assert "nbdmirror resume" not in said
    assert "I/O error (nospace): no room; the points before it stay; cancel the job" in said
    said = " ".join(explanation(job(left_bytes=100 * MiB, **stopped)))
    assert "try again with: nbdmirror resume" in said, "the image has no space left"


def test_before_the_first_point_nothing_is_said_of_the_next_one() -> None:
    seeding: dict[str, Any] = {"sequence": None, "points": None}
    said = explanation(job(left_bytes=900 * MiB, points=seeding, status="running", ready=False))
    assert "point" not in " ".join(said)
    broken: dict[str, Any] = {"io-status": "nospace", "status": "paused", "paused": True}
    said = explanation(job(left_bytes=900 * MiB, points=seeding, ready=False, **broken))
    assert "try again with: nbdmirror resume" in " ".join(said)
