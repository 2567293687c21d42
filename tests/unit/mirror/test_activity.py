"""What may follow what a job does: the table, its page, and that nothing else is possible."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.mirror.jobparts import ready

from nbdmirror.mirror.activity import MAY_FOLLOW, Activity

DESIGN = Path(__file__).resolve().parents[3] / "docs/design.md"


def rows() -> list[list[str]]:
    """The table of docs/design.md."""
    text = DESIGN.read_text().partition("\n## What a job does\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_has_the_table_of_the_code() -> None:
    assert [
        (name, copies == "yes", held == "may be", followers)
        for name, _, copies, held, followers in rows()
    ] == [
        (
            activity.value,
            activity.copies,
            activity.may_hold_guests,
            ", ".join(one.value for one in Activity if one in MAY_FOLLOW[activity]) or "-",
        )
        for activity in Activity
    ]


def test_every_activity_can_be_reached_and_left() -> None:
    reached = {Activity.NOT_STARTED}.union(*MAY_FOLLOW.values())
    assert reached == set(Activity)
    assert [activity for activity in Activity if not MAY_FOLLOW[activity]] == [Activity.ENDED]


def test_from_wherever_guests_may_be_held_there_is_a_way_to_let_them_go() -> None:
    for activity in Activity:
        if activity.may_hold_guests:
            assert any(not after.may_hold_guests for after in MAY_FOLLOW[activity])


@pytest.mark.parametrize("activity", Activity)
def test_a_job_does_nothing_that_the_table_does_not_have(activity: Activity) -> None:
    world = ready()
    if activity in MAY_FOLLOW[Activity.COPYING]:
        world.job.become(activity)
        assert world.job.activity is activity
    else:
        with pytest.raises(AssertionError, match=f"no way from copying to {activity.value}"):
            world.job.become(activity)
        assert world.job.activity is Activity.COPYING
