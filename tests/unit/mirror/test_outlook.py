"""What is predicted of mirrors, against what then happens to them, in virtual time: a disk of some
thousand granules, guests of several kinds, and a copier that goes over the disk again and again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.mirror.hot_last import HotLast
from nbdmirror.mirror.outlook import Outlook, Prediction

GRANULARITY = 1 << 16
GRANULES = 4096
STEP_S = 0.05
FULL_S = 40.0
"""A copy of a disk that nobody writes to takes so long."""

RATE = GRANULES / FULL_S
SEED = 20261129

Guest = Callable[[random.Random, float], Iterable[int]]
"""The granules that are written in the step that begins at a time."""


def writes(rng: random.Random, a_second: float) -> range:
    whole, part = divmod(a_second * STEP_S, 1)
    return range(int(whole) + (rng.random() < part))


def steady(share: float, granules: int = GRANULES) -> Guest:
    """Anywhere in the first `granules`; so many writes as `share` of the copier's rate."""
    return lambda rng, _: [rng.randrange(granules) for _ in writes(rng, share * RATE)]


def skewed(share: float) -> Guest:
    """Few granules often, and most of them seldom, all over the disk."""
    order = list(range(GRANULES))
    random.Random(SEED).shuffle(order)
    return lambda rng, _: [
        order[min(GRANULES - 1, int(GRANULES ** rng.random()) - 1)]
        for _ in writes(rng, share * RATE)
    ]


def by_turns(guest: Guest, busy_s: float, idle_s: float) -> Guest:
    return lambda rng, at_s: guest(rng, at_s) if at_s % (busy_s + idle_s) < busy_s else []


def both(*guests: Guest) -> Guest:
    return lambda rng, at_s: [granule for guest in guests for granule in guest(rng, at_s)]


class World:
    """`rate`: granules a second, by time. `leaves_hot`: what is hot is copied last."""

    def __init__(
        self,
        guest: Guest,
        rate: Callable[[float], float] = lambda _: RATE,
        *,
        leaves_hot: bool = True,
    ) -> None:
        self.dirty = DirtyBitmap(GRANULES * GRANULARITY, GRANULARITY)
        self.dirty.mark_all()
        self.outlook = Outlook(self.dirty)
        self.hot = HotLast(self.dirty)
        self.now_s = 0.0
        self.said: list[tuple[float, Prediction]] = []
        self._guest, self._rate, self._rng = guest, rate, random.Random(SEED)
        self._cursor, self._room, self.sent = 0, 0.0, 0
        self._leaves_hot = leaves_hot
        self.copied_s = [0.0] * GRANULES
        """When each granule was copied last."""

    def step(self) -> bool:
        """Whether the mirror is in sync at the end of the step."""
        for granule in self._guest(self._rng, self.now_s):
            self.dirty.mark(granule * GRANULARITY, GRANULARITY)
        self._room += self._rate(self.now_s) * STEP_S
        while self._room >= 1:
            run = None
            if self._cursor:
                run = (self.hot.held or self.dirty).next_run(self._cursor, GRANULARITY)
            if run is None:
                if self._cursor and self._leaves_hot:
                    self.hot.end_round(self.now_s)
                self._cursor = 0
                if self.now_s < self.hot.rest_until_s:
                    self._room = 0.0
                    break
                self.hot.begin_round(is_hurried=self._leaves_hot)
                run = (self.hot.held or self.dirty).next_run(0, GRANULARITY)
                run = run or self.dirty.next_run(0, GRANULARITY)
            if run is None:
                return True
            self.dirty.clear(*run)
            self._cursor = sum(run)
            self.copied_s[run[0] // GRANULARITY] = self.now_s
            self.sent += GRANULARITY
            self._room -= 1
        self.now_s += STEP_S
        hot = self.hot if self._leaves_hot else None
        self.outlook.look(self.now_s, self._cursor, self.sent, 0, hot)
        self.hot.look(self.now_s, self._cursor, self.outlook.rate)
        return False

    def run(self, most_s: float) -> float | None:
        """When the mirror is in sync; None: not within this time."""
        for step in range(int(most_s / STEP_S)):
            if self.step():
                return self.now_s
            if step % 20 == 19 and (found := self.outlook.predict(self.now_s)) is not None:
                self.said.append((self.now_s, found))
        return None


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.7])
@pytest.mark.parametrize("kind", [steady, skewed])
def test_from_the_middle_of_a_copy_the_end_is_known_to_a_tenth(
    kind: Callable[[float], Guest], share: float
) -> None:
    world = World(kind(share))
    end_s = world.run(20 * FULL_S)
    assert end_s is not None
    late = [(at_s, found) for at_s, found in world.said if at_s >= FULL_S / 2]
    assert late and all(found.end_s is not None for _, found in late)
    wrong = {at_s: at_s + (found.end_s or 0) - end_s for at_s, found in late}
    assert max(map(abs, wrong.values())) <= 0.1 * end_s, wrong


HOT = 40
"""Granules of 1 % of the disk."""


@pytest.mark.parametrize(
    "guest",
    [
        steady(0.6),
        skewed(0.7),
        steady(0.9, HOT),
        by_turns(steady(2.0), 10.0, 30.0),
        by_turns(steady(1.5), 20.0, 20.0),
        by_turns(skewed(2.0), 3.0, 3.0),
        by_turns(steady(3.0, GRANULES // 4), 25.0, 25.0),
    ],
)
@pytest.mark.parametrize("halves_at_s", [None, 15.0])
def test_of_a_mirror_that_ends_it_is_never_said_that_it_does_not(
    guest: Guest, halves_at_s: float | None
) -> None:
    def rate(at_s: float) -> float:
        return RATE / 2 if halves_at_s is not None and at_s >= halves_at_s else RATE

    world = World(guest, rate)
    if world.run(20 * FULL_S) is not None:
        assert not [at_s for at_s, found in world.said if found.never]


@pytest.mark.parametrize("share", [2.0, 10.0])
@pytest.mark.parametrize("granules", [GRANULES, GRANULES // 4])
def test_of_a_mirror_that_does_not_end_that_is_said(share: float, granules: int) -> None:
    world = World(steady(share, granules))
    assert world.run(6 * FULL_S) is None
    assert world.said[-1][1].never
    left_s = world.dirty.dirty_granules / RATE
    assert world.said[-1][1].behind_s == pytest.approx(left_s, rel=0.3)
