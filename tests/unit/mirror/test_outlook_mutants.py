"""Mutants of predictions: each leaves out one thing that is known of guests, and the test beside it
must then fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from unit.mirror import test_guest_watch as watches
from unit.mirror import test_outlook as outlooks
from unit.mirror.guestparts import Scene
from unit.mirror.test_job_mutants import Mutant, broken

from nbdmirror.mirror import guest_watch, outlook
from nbdmirror.mirror.area import Area, Change
from nbdmirror.mirror.guest_watch import GuestWatch
from nbdmirror.mirror.outlook import NEVER_S, Outlook
from nbdmirror.mirror.working_set import WorkingSet

pytestmark = pytest.mark.slow

SHORT, LONG = Scene(8.0), Scene(40.0)


def known(name: str, scene: Scene) -> Callable[[], None]:
    """The end of a copy beside this guest."""
    test = outlooks.test_in_the_later_half_of_the_first_pass_the_end_is_known
    return lambda: test(scene, outlooks.GUESTS[name])


def endless(name: str, scene: Scene) -> Callable[[], None]:
    test = outlooks.test_of_a_mirror_that_does_not_end_that_is_said
    return lambda: test(scene, outlooks.ENDLESS[name])


def ends(name: str) -> Callable[[], None]:
    test = outlooks.test_of_a_mirror_that_ends_it_is_never_said_that_it_does_not
    return lambda: test(outlooks.ENDS[name], lambda _: 1.0)


def no_stream(self: Area, age_s: float, part: float, length: int) -> float:
    return 0.0


LOOK_FOR_A_STREAM, LOOK, TAKE = Area._look_for_a_stream, Area.look, Area.take


def never_unclear(self: Area, age_s: float, part: float, length: int) -> float:
    found = LOOK_FOR_A_STREAM(self, age_s, part, length)
    self.is_unclear = False
    return found


def nothing_taken_back(self: Area, now_s: float, dirty: int) -> Change | None:
    found = LOOK(self, now_s, dirty)
    return None if found is None else replace(found, steady=max(0.0, found.steady))


def never_hot(self: Area, at_s: float, left_out: int = 0) -> None:
    TAKE(self, at_s, left_out)
    self._was_unclear = False


def all_was_clean(self: Area, at_s: float, left_out: int = 0) -> None:
    TAKE(self, at_s)


def not_falling(self: WorkingSet) -> list[tuple[float, float]]:
    found = sorted(self._classes.items())
    return [(key / 10, changed / clean) for key, (changed, clean) in found]


def as_predicted(self: Outlook, stalled_s: float, end_s: float | None) -> bool:
    return stalled_s >= NEVER_S and end_s is None


MUTANTS = [
    Mutant(
        "no guest is sequential",
        Area,
        "_look_for_a_stream",
        no_stream,
        known("a log", LONG),
    ),
    Mutant(
        "what was taken for steady is not taken back",
        Area,
        "look",
        nothing_taken_back,
        watches.test_what_was_taken_for_steady_is_taken_back,
    ),
    Mutant(
        "what is dirty at once is hot",
        Area,
        "_look_for_a_stream",
        never_unclear,
        watches.test_what_is_dirty_at_once_is_unclear_and_hot_if_it_is_so_again,
    ),
    Mutant(
        "what is dirty at once is never hot",
        Area,
        "take",
        never_hot,
        watches.test_what_is_dirty_at_once_is_unclear_and_hot_if_it_is_so_again,
    ),
    Mutant(
        "what was left dirty was clean",
        Area,
        "take",
        all_was_clean,
        watches.test_what_was_left_dirty_says_nothing_of_steady_guests,
    ),
    Mutant("a curve may rise", WorkingSet, "_falling", not_falling, watches.test_a_curve_falls),
    Mutant(
        "all places are changed alike",
        GuestWatch,
        "_sameness",
        property(lambda self: 1.0),
        watches.test_a_guest_in_one_place_says_little_of_other_places,
    ),
    Mutant(
        "each place is changed as all are",
        GuestWatch,
        "_factor",
        lambda self, area, now_s: 1.0,
        known("hot 5 %, at the start", SHORT),
    ),
    Mutant(
        "all that is written is seen",
        GuestWatch,
        "_unseen",
        property(lambda self: 0.0),
        watches.test_what_is_written_and_not_seen_is_ahead_of_the_copier,
    ),
    Mutant(
        "nothing is doubted",
        guest_watch,
        "DOUBT",
        0.0,
        known("bursts", LONG),
    ),
    Mutant(
        "what was predicted comes",
        Outlook,
        "_is_stalled",
        as_predicted,
        endless("Zipf 1.1", SHORT),
    ),
    Mutant(
        "a guest that works by turns does not pause",
        outlook,
        "NEVER_S",
        10.0,
        ends("20 s of 40"),
    ),
    Mutant(
        "a long copy does not come closer slowly",
        outlook,
        "NEVER_PART",
        0.0,
        outlooks.test_of_a_long_copy_it_is_not_said_that_it_does_not_end,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_is_left_out_is_noticed(mutant: Mutant) -> None:
    mutant.test(*mutant.arguments)
    with broken(mutant), pytest.raises((Exception, pytest.fail.Exception)):
        mutant.test(*mutant.arguments)
