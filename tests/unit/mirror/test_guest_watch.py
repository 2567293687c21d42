"""What is learned of guests from dirty bits: streams, what is hot, and how much is changed in so
much time; and what follows for the passes of a copy. By hand, without a copier."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from unit.mirror.guestparts import GRANULARITY

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.mirror.area import UNCLEAR, Area, Change
from nbdmirror.mirror.areas import PLACES
from nbdmirror.mirror.forecast import Guests, Place, forecast
from nbdmirror.mirror.guest_watch import DOUBT, GuestWatch
from nbdmirror.mirror.working_set import WorkingSet

GRANULES = 1 << 10
SEED = 20261130


def area(*looks: tuple[float, float], left_out: float = 0.0) -> list[Change]:
    """`looks`: seconds since the copier was there, and the part that is dirty then."""
    found = Area(0, GRANULES * GRANULARITY, GRANULARITY)
    found.take(100.0, int(left_out * GRANULES) * GRANULARITY)
    changes = [look(found, 100.0 + at_s, part) for at_s, part in looks]
    assert None not in changes
    return [change for change in changes if change is not None]


def look(found: Area, at_s: float, part: float) -> Change | None:
    return found.look(at_s, int(part * GRANULES) * GRANULARITY)


def granules(length: float) -> int:
    return round(length / GRANULARITY)


def total(changes: list[Change], kind: str) -> int:
    return granules(sum(getattr(change, kind) for change in changes))


# Areas.


@pytest.mark.parametrize("writes", [10, 100, 1000])
@pytest.mark.parametrize("hot", [1.0, 0.5, 0.01])
def test_a_steady_guest_is_no_stream(writes: int, hot: float) -> None:
    """At random in a part of the area, so many writes in each of 64 looks."""
    rng, dirty, looks = random.Random(SEED), set[int](), []
    for step in range(1, 65):
        dirty |= {rng.randrange(int(hot * GRANULES)) for _ in range(writes)}
        looks.append((step * 0.5, len(dirty) / GRANULES))
    changes = area(*looks)
    assert total(changes, "streamed") == 0
    assert total(changes, "steady") == len(dirty)


@pytest.mark.parametrize("at_s", [4.0, 20.0])
@pytest.mark.parametrize("takes", [1, 3, 10])
def test_a_place_that_was_clean_for_long_has_met_a_stream(at_s: float, takes: int) -> None:
    times = [0.5 * step for step in range(1, 80)]
    looks = [(time_s, min(1.0, max(0.0, (time_s - at_s) / 0.5 / takes))) for time_s in times]
    changes = area(*looks)
    assert total(changes, "streamed") == GRANULES
    assert abs(total(changes, "steady")) <= 0.02 * GRANULES, "taken back when it is known"


def test_what_was_taken_for_steady_is_taken_back() -> None:
    """So slow a stream is not told from chance at once."""
    changes = area(*((0.5 * step, 2 * max(0, step - 40) / GRANULES) for step in range(1, 100)))
    assert any(change.steady > 0 for change in changes)
    assert total(changes, "steady") == total(changes, "clear") == 0
    assert total(changes, "streamed") == 2 * 59


def test_a_stream_is_told_from_a_steady_guest_beside_it() -> None:
    def part(at_s: float) -> float:
        steady = 0.2 * at_s / 40
        return steady if at_s < 20.0 else steady + (1 - steady)

    changes = area(*((0.5 * step, part(0.5 * step)) for step in range(1, 80)))
    assert total(changes, "streamed") == pytest.approx(0.9 * GRANULES, rel=0.1)
    assert total(changes, "steady") == pytest.approx(0.1 * GRANULES, abs=0.1 * GRANULES)


def test_what_is_dirty_at_once_is_unclear_and_hot_if_it_is_so_again() -> None:
    found = Area(0, GRANULES * GRANULARITY, GRANULARITY)
    for visit in (100.0, 200.0, 300.0):
        found.take(visit)
        changes = [look(found, visit + 1.0, 0.1), look(found, visit + 1.5, 0.9)]
        clear = granules(sum(change.clear for change in changes if change is not None))
        assert found.is_unclear
        assert clear == (0 if visit == 100.0 else int(0.9 * GRANULES))
    found.take(400.0)
    look(found, 401.0, UNCLEAR / 2)
    assert not found.is_unclear


def test_what_was_left_dirty_says_nothing_of_steady_guests() -> None:
    changes = area((1.0, 0.5), (2.0, 0.5), (16.0, 0.5), (17.0, 1.0), left_out=0.5)
    assert total(changes, "steady") == total(changes, "clean") == 0
    assert total(changes, "streamed") == pytest.approx(0.5 * GRANULES, abs=2)


def test_a_few_granules_can_be_dirty_by_chance() -> None:
    found = Area(0, 8 * GRANULARITY, GRANULARITY)
    found.take(0.0)
    assert found.look(1.0, 4 * GRANULARITY) is not None
    assert not found.is_unclear
    change = found.look(8.0, 8 * GRANULARITY)
    assert change is not None and change.streamed == 0


def test_nothing_is_told_of_an_area_where_the_copier_was_not() -> None:
    found = Area(0, GRANULES * GRANULARITY, GRANULARITY)
    assert look(found, 1.0, 1.0) is None
    found.take(2.0)
    assert look(found, 3.0, 0.0) is not None
    found.forget()
    assert look(found, 4.0, 1.0) is None


# The curve.


def survivors(rates: list[float], ages_s: list[float]) -> list[tuple[float, float]]:
    """The part of places, each changed so often in a second, that is clean at each age; and the
    part that changes until the next age."""
    clean = [sum(math.exp(-rate * age_s) for rate in rates) / len(rates) for age_s in ages_s]
    return [(now, now - then) for now, then in itertools.pairwise(clean)]


@pytest.mark.parametrize("rates", [[0.02], [5.0, *[0.0] * 9], [1.0, 0.1, 0.01, 0.001]])
def test_the_curve_is_that_of_the_guest(rates: list[float]) -> None:
    """Though only young areas are seen for long: the copier has just come to most of them."""
    found, step_s = WorkingSet(), 0.1
    ages_s = [step_s * step for step in range(400)]
    for number, (clean, changed) in enumerate(survivors(rates, ages_s)):
        seen = 1 - number / 400
        average = seen * (clean - changed / 2)
        found.note(ages_s[number] + step_s, step_s, average, seen * changed)
    found.fade(0.0, 60.0)
    for age_s in (0.5, 2.0, 10.0, 30.0):
        clean = sum(math.exp(-rate * age_s) for rate in rates) / len(rates)
        assert 1 - math.exp(-found.hazard(age_s)) == pytest.approx(1 - clean, rel=0.15)


def test_a_curve_falls() -> None:
    found = WorkingSet()
    for age_s, changed in ((1.0, 0.01), (2.0, 0.2), (4.0, 0.03), (8.0, -0.05), (16.0, 0.02)):
        found.note(age_s, 0.5, 1.0, changed)
    found.fade(0.0, 60.0)
    hazards = [found.hazard(age_s / 4) for age_s in range(100)]
    steps = [after - before for before, after in itertools.pairwise(hazards)]
    assert all(step >= -1e-12 for step in steps)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(steps))


def test_what_was_seen_long_ago_is_forgotten() -> None:
    found = WorkingSet()
    found.note(1.0, 1.0, 1.0, 0.5)
    found.fade(0.0, 60.0)
    before = found.hazard(1.0)
    found.fade(120.0, 60.0)
    found.note(1.0, 1.0, 1.0, 0.0)
    found.fade(0.0, 60.0)
    assert found.hazard(1.0) < before / 5
    found.fade(1e6, 60.0)
    assert found.hazard(1.0) == 0.0


# The passes.


def passes(guests: Guests, dirty: float = 1.0, rate: float = 64.0) -> tuple[float | None, float]:
    """The end and how far behind, of a disk of which each place has one granule."""
    places = [Place(GRANULARITY, int(dirty * GRANULARITY), 0.0) for _ in range(PLACES)]
    # So small a granule that the last pass is not cut short.
    found = forecast(places, 0, rate * GRANULARITY, GRANULARITY >> 12, guests)
    return found.end_s, found.behind_s


def curve(a_second: float) -> WorkingSet:
    found = WorkingSet()
    found.note(1.0, 1.0, 1.0, a_second)
    found.fade(0.0, 60.0)
    return found


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.9])
def test_a_stream_takes_its_part_of_the_copy(share: float) -> None:
    end_s, behind_s = passes(Guests(WorkingSet(), share * 64.0 * GRANULARITY))
    assert end_s == pytest.approx(1 / (1 - share)) and behind_s == 0.0
    twice = Guests(WorkingSet(), share / 2 * 64.0 * GRANULARITY, times=2.0)
    assert passes(twice)[0] == end_s


def test_a_stream_that_is_faster_than_the_copy_has_no_end() -> None:
    assert passes(Guests(WorkingSet(), 64.0 * GRANULARITY), dirty=0.5) == (None, 0.5)


def test_what_guests_change_elsewhere() -> None:
    """Of places where the copier was not yet nothing is known but what is the same everywhere."""
    places = [Place(GRANULARITY, GRANULARITY, None) for _ in range(PLACES)]
    ends = [
        forecast(places, 0, 64.0 * GRANULARITY, 16, Guests(curve(0.5), elsewhere=elsewhere)).end_s
        for elsewhere in (0.0, 0.5, 1.0)
    ]
    assert ends == sorted(ends, key=lambda end_s: end_s or math.inf)
    assert ends[0] == pytest.approx(1.0)
    assert ends[2] is not None and ends[2] > 1.3


# What guests will do.


class Watched:
    """A disk where the copier goes once from begin to end, a place in a second, and writes."""

    def __init__(self, granules_each: int = 64) -> None:
        self.dirty = DirtyBitmap(PLACES * granules_each * GRANULARITY, GRANULARITY)
        self.dirty.mark_all()
        self.watch = GuestWatch(self.dirty)
        self.place = granules_each * GRANULARITY
        self.written = 0
        self.at = 0
        """The place that the copier takes next."""
        self.watch.areas.moved(0.0, 0, None)
        self.watch.count(0.0, 0, PLACES)

    def copy(self, places: int, then: Callable[[], None] = lambda: None) -> None:
        """`then`: what guests do after each of them."""
        for _ in range(places):
            self.dirty.clear(self.at * self.place, self.place)
            then()
            self.at += 1
            now_s = float(self.at)
            self.watch.areas.moved(now_s, self.at * self.place, None)
            self.watch.count(now_s, self.written, PLACES - now_s)

    def write(self, place: int, part: float = 1.0) -> None:
        length = int(part * self.place)
        self.dirty.mark(place * self.place, length)
        self.written += length


def test_what_is_written_and_not_seen_is_ahead_of_the_copier() -> None:
    found = Watched()
    for step in range(16):
        found.copy(1)
        found.write(40 + step // 2, 0.5)
    rate = found.place / 2
    assert found.watch.likely.stream_bytes_per_s == 0.0
    assert found.watch.most.stream_bytes_per_s == pytest.approx(rate, rel=0.1)
    assert found.watch.least.stream_bytes_per_s == 0.0


def test_where_the_copier_was_everywhere_nothing_is_unseen() -> None:
    found = Watched()
    for step in range(PLACES):
        found.write(min(PLACES - 1, step + 4), 0.5)
        found.copy(1)
    assert found.watch.most.stream_bytes_per_s > 0.0
    found.watch.areas.moved(PLACES + 1.0, 0, None)
    assert found.watch.most.stream_bytes_per_s == 0.0


def test_a_guest_in_one_place_says_little_of_other_places() -> None:
    found = Watched()
    rng = random.Random(SEED)
    for _ in range(32):
        found.copy(1)
        granule = rng.randrange(64)
        found.dirty.mark(granule * GRANULARITY, 1)
    assert found.watch.likely.elsewhere <= 0.2
    assert (found.watch.least.elsewhere, found.watch.most.elsewhere) == (0.0, 1.0)


def test_a_guest_in_all_places_says_what_it_does_elsewhere() -> None:
    found = Watched()
    rng = random.Random(SEED)
    for _ in range(32):
        found.copy(1)
        for _ in range(8):
            found.dirty.mark(rng.randrange(PLACES * 64) * GRANULARITY, 1)
    assert found.watch.likely.elsewhere >= 0.7
    assert (found.watch.least.times, found.watch.most.times) == (1 - DOUBT, 1 + DOUBT)


def test_a_stream_is_seen_where_the_copier_was() -> None:
    found = Watched()
    found.copy(8)
    for step in range(48):
        found.write(step // 2, 0.5)
        if step % 2:
            found.dirty.mark(step // 2 * found.place, found.place)
        found.copy(1)
    rate = found.place / 2
    assert found.watch.likely.stream_bytes_per_s == pytest.approx(rate, rel=0.25)


def test_what_became_dirty_without_a_guest_says_nothing() -> None:
    found = Watched()
    found.copy(32)
    found.watch.areas.forget()
    found.dirty.mark_all()
    found.copy(1)
    assert found.watch.likely.working_set.hazard(10.0) == 0.0
    assert found.watch.likely.stream_bytes_per_s == 0.0
