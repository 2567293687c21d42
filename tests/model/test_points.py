"""What a recovery makes is what the disk was, at whatever moment it begins (pointmachine.py), and
each mutant that breaks a rule is caught (pointmutants.py). So it is with what is served of a point
while the source goes on (pointviews.py). A source that keeps the points of a window gives up none
of them without need (pointwindows.py)."""

from __future__ import annotations

import pytest
from model.pointmachine import PointMachine
from model.pointmutants import POINT_MUTANTS
from model.pointviews import VIEW_MUTANTS, ViewedWorld, ViewMachine
from model.pointwindows import WINDOW_MUTANTS, WindowMachine, WindowWorld
from model.pointworld import PointWorld
from model.search import hold, search
from support.in_parts import in_parts

EXAMPLES = 100
MUTANT_EXAMPLES_MAX = 60


@pytest.mark.guarantee("A point is the disk of one moment")
@pytest.mark.timeout(240)
@in_parts(EXAMPLES)
def test_each_point_is_what_the_disk_was(examples: int) -> None:
    hold(PointMachine, examples)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mutant", POINT_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_is_caught(mutant: type[PointWorld]) -> None:
    with pytest.raises(AssertionError, match="lost"):
        search(PointMachine, mutant, MUTANT_EXAMPLES_MAX)


@pytest.mark.timeout(240)
@in_parts(EXAMPLES)
def test_a_point_that_is_served_is_what_the_disk_was(examples: int) -> None:
    hold(ViewMachine, examples)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mutant", VIEW_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_of_what_is_served_is_caught(mutant: type[ViewedWorld]) -> None:
    with pytest.raises(AssertionError, match="lost"):
        search(ViewMachine, mutant, MUTANT_EXAMPLES_MAX)


@pytest.mark.timeout(240)
@in_parts(EXAMPLES)
def test_a_point_of_the_window_is_kept(examples: int) -> None:
    hold(WindowMachine, examples)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mutant", WINDOW_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_of_the_window_is_caught(mutant: type[WindowWorld]) -> None:
    with pytest.raises(AssertionError, match="lost"):
        search(WindowMachine, mutant, MUTANT_EXAMPLES_MAX)
