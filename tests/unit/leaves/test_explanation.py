"""What is said of a job is in plain words, for each of its states, and never contradicts itself."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.images import MiB
from support.madeservers import JOB, WAITS

from nbdmirror.explanation import _percents, doing, explanation, remarks, shares
from nbdmirror.mirror.job_states import JobStatus
from nbdmirror.mirror.ladder import PIVOT_S, Situation, next_step
from nbdmirror.mirror.options import MirrorOptions
from nbdmirror.mirror.waits import RECENT_S, Cause

COPYING = JOB | {"status": "running", "ready": False, "written-bytes": 1 << 31, "left-s": 130.0}
OLD_S = 2 * RECENT_S


def waits(now: str, share: float = 1.0, age_s: float = OLD_S) -> dict[str, Any]:
    """A job that waits for `now`, for `share` of its time."""
    rest = "nothing-to-do" if now != "nothing-to-do" else "source-read"
    parts = dict.fromkeys(map(str, Cause), 0.0) | {now: share, rest: 1 - share}
    seconds = {cause: age_s * part for cause, part in parts.items()}
    return {"now": now, "last-minute": parts, "since-start": parts, "seconds": seconds}


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ("source-read", "waits for the source to read"),
        ("target-write", "waits for the target to write"),
        ("target-flush", "waits for the target to flush"),
        ("speed-limit", "waits for its speed limit of 4 MiB/s"),
        ("yielding", "leaves room for guests' requests"),
        ("nothing-to-do", "has nothing to do"),
    ],
)
def test_a_job_that_copies(now: str, words: str) -> None:
    job = COPYING | {"waits": waits(now, 0.8), "speed": 4 * MiB}
    (said,) = explanation(job)
    assert said.startswith(words)
    assert "(80 % of the last minute)" in said
    assert said.endswith("; in sync in about 2:10")


def test_a_job_that_is_young() -> None:
    job = COPYING | {"waits": waits("target-write", 0.8, age_s=9.0)}
    assert "(80 % of the time)" in doing(job)
    assert shares(job) == {"since the start": "target write 80 %, nothing to do 20 %"}
    assert shares(COPYING | {"waits": waits("target-write", 0.8)}) == {
        "in the last minute": "target write 80 %, nothing to do 20 %",
        "since the start": "target write 80 %, nothing to do 20 %",
    }


@pytest.mark.parametrize(
    ("known", "words"),
    [
        (
            {"copied-bytes": 1 << 31, "written-bytes": 1 << 30},
            "in sync in about 2:10, or sooner if more of the disk is zeroes",
        ),
        ({"left-s-min": 120.0, "left-s-max": 140.0}, "in sync in about 2:10"),
        ({"left-s-min": 100.0, "left-s-max": 200.0}, "in sync in about 2:10 (1:40 to 3:20)"),
        ({"left-s-min": 120.0}, "in sync in about 2:10 (2:00 at least)"),
        ({"left-s": None}, "its end cannot be predicted"),
        (
            {"left-s": None, "left-s-min": 100.0},
            "its end cannot be predicted: it takes 1:40 at least",
        ),
        (
            {"left-s": None, "dirty-bytes-per-s": 5 * MiB},
            "the guest changes as much as is copied, so its end cannot be predicted",
        ),
        (
            {"left-s": None, "copy-bytes-per-s": 0, "zero-bytes-per-s": 0},
            "nothing was copied in the last seconds, so its end cannot be predicted",
        ),
        (
            {"left-s": None, "copy-bytes-per-s": 0, "zero-bytes-per-s": MiB},
            "the last seconds copied holes and no data, so its end cannot be predicted",
        ),
        ({"copy-bytes-per-s": None}, "its end cannot be predicted yet"),
        ({"status": "ready", "ready": True}, "the target follows the source, and the job can be"),
    ],
)
def test_whether_it_will_end(known: dict[str, Any], words: str) -> None:
    job = COPYING | {"waits": waits("target-write")} | known
    (said,) = explanation({key: value for key, value in job.items() if value is not None})
    assert f"; {words}" in said


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.0, "no write, trim or flush of a guest has waited"),
        (0.0004, "spent less than 0.1 % of their time waiting for the mirror"),
        (0.123, "spent 12.3 % of their time waiting for the mirror"),
    ],
)
def test_what_it_costs_the_guest(share: float, words: str) -> None:
    job = COPYING | {"waits": waits("target-write")}
    assert words in explanation(job | {"guests-wait-share": share})[-1]
    assert len(explanation(job)) == 1, "not known"


def test_writes_to_what_is_hot_wait() -> None:
    said = explanation(COPYING | {"waits": waits("target-write"), "blocking-bytes": 20 * MiB})
    assert "to the 20 MiB that they change again and again wait" in said[1]
    assert "nbdmirror change --may nothing" in said[1]


FOLLOWING = {"ready": True, "status": "ready"}
JOURNAL_LOST = {
    "target-lost-for-s": 9.0,
    "journal": "nbd://b/vda-journal",
    "journal-connected": False,
}
BEHIND = COPYING | {
    "falling-behind": True,
    "copy-bytes-per-s": 110 * MiB,
    "dirty-bytes-per-s": 180 * MiB,
}


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, "the target takes 110 MiB/s: at these rates the mirror does not finish; this"),
        ({}, "change --may throttle, or: nbdmirror copy-mode write-blocking"),
        ({"may": ["write-blocking"]}, "this would end it: nbdmirror change --may throttle,write-b"),
        ({"may": ["throttle"]}, "this would end it: nbdmirror copy-mode write-blocking"),
        ({"may": ["throttle", "write-blocking"]}, "does not finish; what --may allows will end"),
        (FOLLOWING, "the mirror does not catch up; this would end it: nbdmirror copy-mode write"),
        (FOLLOWING | {"may": ["throttle"]}, "copy-mode write-blocking, or: nbdmirror complete"),
        (FOLLOWING | {"may": ["write-blocking"]}, "this would end it: nbdmirror copy-mode write-b"),
        ({"waits": waits("source-read")}, "the source gives 110 MiB/s"),
        ({"waits": waits("yielding")}, "a copy that leaves room for guests takes 110 MiB/s"),
        ({"copy-mode": "write-blocking"}, "a faster target, or a throttle of the guest"),
        ({"speed": 9, "waits": waits("speed-limit")}, "the speed limit allows 110 MiB/s"),
        ({"speed": 9, "waits": waits("speed-limit")}, "raise the limit with: nbdmirror set-speed"),
        ({"speed": 9, "waits": waits("target-write")}, "copy-mode write-blocking"),
    ],
)
def test_a_guest_that_is_faster(known: dict[str, Any], words: str) -> None:
    """A higher limit is advised where the limit is the reason, and not where it is just set."""
    said = explanation(BEHIND | {"waits": waits("target-write")} | known)
    assert len(said) == 2
    assert "the guest changes 180 MiB/s of different data" in said[1]
    assert words in said[1]


@pytest.mark.parametrize("may", [[], ["throttle"], ["write-blocking"]])
@pytest.mark.parametrize("ending", ["none", "complete", "cancel"])
@pytest.mark.parametrize("is_ready", [False, True])
def test_what_is_advised_does_something(is_ready: bool, ending: str, may: list[str]) -> None:
    """A `--may` that the ladder would not act upon is not advised, and neither is one that is there
    already, or would take away another."""
    known = {"ready": is_ready, "status": "ready" if is_ready else "running"}
    job = BEHIND | known | {"ending": ending if is_ready else "none", "may": may}
    advised = re.findall(r"change --may ([\w,-]+)(?:$|, or)", explanation(job)[-1])
    assert bool(advised) is ("throttle" not in may and (not is_ready or ending != "none"))
    for allowed in (one.split(",") for one in advised):
        assert set(allowed) > set(may)
        is_ending = job["ending"] != "none"
        now = Situation(
            is_ready=is_ready,
            never=not is_ready,
            pivot_waits_s=2 * PIVOT_S if is_ready and is_ending else 0.0,
            is_ending=is_ending,
            bytes_per_s=110.0 * MiB,
        )
        assert next_step(MirrorOptions("j", may=tuple(allowed)), now) is not None


@pytest.mark.parametrize("changed", [100 * MiB, 110 * MiB, 120 * MiB])
def test_a_guest_that_changes_the_same_again(changed: int) -> None:
    """Such a mirror stays behind, though not more is changed than is copied, but for what the rates
    are wrong by."""
    said = explanation(BEHIND | {"waits": waits("target-write"), "dirty-bytes-per-s": changed})
    words = "the target takes 110 MiB/s, and the guest changes as much of that again: at these"
    assert words in said[1] and "different data" not in said[1]
    assert "in sync in" not in said[0] and "can be completed" not in said[0]


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"status": "paused", "paused": True}, "copies nothing while it is paused"),
        ({"status": "standby", "paused": True}, "continue with: nbdmirror resume"),
        ({"status": "paused", "paused": True, "io-status": "nospace"}, "I/O error (nospace)"),
        ({"paused": True}, "will pause when its requests in flight have ended"),
        ({"status": "pending", "auto-finalize": False}, "nbdmirror finalize"),
        ({"status": "waiting"}, "waits for the other jobs of its group"),
        ({"status": "concluded", "auto-dismiss": False}, "nbdmirror dismiss"),
        ({"target-lost-for-s": 9.0}, "the target has been lost for 0:09"),
        (JOURNAL_LOST, "the journal nbd://b/vda-journal has been lost for 0:09"),
        (
            JOURNAL_LOST | {"target-connected": False},
            "the target and its journal have been lost for 0:09, reconnecting without a limit; che",
        ),
        ({"target-silent-for-s": 9.0}, "the target has not answered for 0:09"),
        ({"source-silent-for-s": 9.0}, "the source has not answered for 0:09"),
    ],
)
@pytest.mark.parametrize("is_behind", [False, True])
def test_what_is_in_its_way_says_it_all(known: dict[str, Any], words: str, is_behind: bool) -> None:
    job = COPYING | {"waits": waits("paused"), "falling-behind": is_behind} | known
    assert doing(job) == ""
    assert words in " ".join(explanation(job))


def test_an_end_that_is_asked_for() -> None:
    job = JOB | {"waits": waits("target-write"), "ending": "complete", "ending-for-s": 9.0}
    first, second = explanation(job)
    assert first == "waits for the target to write (100 % of the last minute)"
    assert "completing for 0:09" in second


def test_a_server_that_does_not_know() -> None:
    """It is older: nothing is made up."""
    older = {key: value for key, value in COPYING.items() if key != "waits"}
    assert explanation(older) == []
    assert shares(older) == {}


FLAGS: dict[str, tuple[Any, ...]] = {
    "status": tuple(map(str, JobStatus)),
    "now": tuple(map(str, Cause)),
    "falling-behind": (False, True),
    "left-s": (None, 0.0, 5.0),
    "left-s-min": (None, 3.0),
    "ending": ("none", "complete"),
    "target-lost-for-s": (None, 3.0),
}


ENDS = (
    *("in sync in", "does not finish", "does not catch up", "can be completed"),
    *("cannot be predicted", "has ended", "has finished its work", "copies nothing"),
)
"""How a job goes on: one of these, or none."""


def test_no_two_sentences_contradict_each_other() -> None:
    for values in itertools.product(*FLAGS.values()):
        given_ = dict(zip(FLAGS, values, strict=True))
        status = given_["status"]
        is_paused, is_ready = status in ("paused", "standby"), status in ("ready", "standby")
        job = JOB | {"paused": is_paused, "ready": is_ready, "waits": waits(given_.pop("now"))}
        job = {key: value for key, value in (job | given_).items() if value is not None}
        said = "; ".join(explanation(job))
        ends = [words for words in ENDS if words in said]
        assert len(ends) <= 1, (given_, said)
        assert len(re.findall("waits for the target to", said)) <= 1


@given(
    st.lists(st.floats(0, 1), min_size=len(Cause), max_size=len(Cause)).filter(
        lambda parts: sum(parts) > 0
    )
)
def test_per_cents_add_up(parts: list[float]) -> None:
    whole = sum(parts)
    found = {cause: part / whole for cause, part in zip(map(str, Cause), parts, strict=True)}
    percents = _percents(found)
    assert sum(percents.values()) == 100
    assert all(math.fabs(percents[cause] - 100 * found[cause]) < 1 for cause in found)


def test_the_sample_is_like_a_server() -> None:
    assert WAITS.keys() == waits("paused").keys()
    assert set(WAITS["seconds"]) == set(map(str, Cause))


def deadline(outlook: str, action: str = "report", left_s: float = 90.0) -> dict[str, Any]:
    found = {"outlook": outlook, "on-deadline": action, "left-s": left_s, "at-s": 1e9}
    return {"x-nbdmirror-deadline": found}


@pytest.mark.parametrize(
    ("known", "words"),
    [
        (deadline("not-known"), "whether its deadline in 1:30 can be kept is not known yet"),
        (deadline("can-be-kept"), "its deadline in 1:30 can be kept"),
        (
            deadline("may-be-missed") | {"left-s-min": 60.0, "left-s-max": 120.0},
            "its deadline in 1:30 may be missed: the copy takes 1:00 to 2:00",
        ),
        (
            deadline("may-be-missed") | {"left-s-min": 60.0},
            "its deadline in 1:30 may be missed: the copy takes 1:00 at least",
        ),
        (
            deadline("cannot-be-kept"),
            "its deadline in 1:30 cannot be kept: the guest changes as much as is copied",
        ),
        (
            deadline("passed", left_s=0.0),
            "its deadline has passed; it is not ready; give it up with: nbdmirror cancel",
        ),
        (
            deadline("passed", "complete", left_s=0.0),
            "its deadline has passed; it is completed as soon as it is ready",
        ),
    ],
)
def test_whether_a_deadline_can_be_kept(known: dict[str, Any], words: str) -> None:
    job = COPYING | {"waits": waits("target-write")} | known
    assert explanation(job)[-1] == words


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("report", "nothing is done then; end it before with: nbdmirror complete"),
        ("cancel", "it is cancelled then"),
        ("complete", "it is completed then"),
    ],
)
def test_the_deadline_of_a_ready_job(action: str, words: str) -> None:
    said = explanation(JOB | deadline("can-be-kept", action))
    assert said[-1] == f"its deadline in 1:30 can be kept; {words}"
    said = explanation(JOB | deadline("may-be-missed", action))
    assert said[-1].endswith("may be missed: a pivot would hold guests' writes for too long now")
    assert not [line for line in explanation(JOB) if "deadline" in line]
    said = explanation(JOB | deadline("passed", left_s=0.0))
    assert said[-1].endswith("passed; end it with: nbdmirror complete, or with: nbdmirror cancel")


@pytest.mark.parametrize(
    ("known", "is_trouble"),
    [
        (deadline("can-be-kept"), False),
        (deadline("not-known"), False),
        (deadline("may-be-missed"), True),
        (deadline("passed"), True),
        ({"ending": "complete", "ending-for-s": 1.0}, False),
        ({"ending": "complete", "ending-for-s": 9.0, "quiesce-timeouts": 2}, True),
        ({"status": "standby", "paused": True}, False),
        ({"status": "standby", "paused": True, "io-status": "failed"}, True),
        ({"target-silent-for-s": 9.0}, True),
    ],
)
def test_what_is_trouble(known: dict[str, Any], is_trouble: bool) -> None:
    """And what was asked for, or comes by itself: it is not shown in red."""
    (remark,) = remarks(JOB | known)
    assert remark.is_trouble is is_trouble


def test_a_guest_that_is_throttled() -> None:
    said = explanation(COPYING | {"waits": waits("target-write"), "throttle-bytes-per-s": 3 * MiB})
    assert "it may make 3 MiB/s dirty" in said[-1] and "change --may nothing" in said[-1]
