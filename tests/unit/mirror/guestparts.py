"""Guests of several kinds beside a copy, in virtual time: a disk of some thousand granules, and a
copier that goes over the disk again and again. All is drawn from a seed, so a run can be had
again."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.mirror.hot_last import HotLast
from nbdmirror.mirror.outlook import Outlook, Prediction

GRANULARITY = 1 << 16
STEP_S = 0.05


@dataclass(frozen=True)
class Scene:
    """`full_s`: a copy of the disk takes so long if nobody writes."""

    full_s: float = 40.0
    granules: int = 4096
    seed: int = 1

    @property
    def rate(self) -> float:
        """Granules that the copier takes in a second."""
        return self.granules / self.full_s


@dataclass(frozen=True)
class Writer:
    """`writes` returns the granules that are written in the step that begins at a time, one for
    each write; a write has `bytes_each`."""

    writes: Callable[[random.Random, float], Iterable[int]]
    bytes_each: int = 4096


Guest = Callable[[Scene], Writer]


def writes_of(rng: random.Random, scene: Scene, share: float) -> range:
    """So many writes as `share` of what the copier takes in a step."""
    whole, part = divmod(share * scene.rate * STEP_S, 1)
    return range(int(whole) + (rng.random() < part))


def steady(share: float, part: float = 1.0, start: float = 0.0, bytes_each: int = 4096) -> Guest:
    """Anywhere in this part of the disk."""

    def guest(scene: Scene) -> Writer:
        count = max(1, int(scene.granules * part))
        first = min(int(start * scene.granules), scene.granules - count)
        return Writer(
            lambda rng, _: [first + rng.randrange(count) for _ in writes_of(rng, scene, share)],
            bytes_each,
        )

    return guest


def zipf(share: float, exponent: float) -> Guest:
    """Few granules often, and most of them seldom, all over the disk."""

    def guest(scene: Scene) -> Writer:
        order = list(range(scene.granules))
        random.Random(scene.seed).shuffle(order)
        sums = list(accumulate(rank**-exponent for rank in range(1, scene.granules + 1)))
        return Writer(
            lambda rng, _: [
                order[min(scene.granules - 1, bisect_left(sums, rng.random() * sums[-1]))]
                for _ in writes_of(rng, scene, share)
            ]
        )

    return guest


def sequential(share: float, start: float = 0.0, part: float = 1.0) -> Guest:
    """From one end of this part of the disk to the other, and again."""

    def guest(scene: Scene) -> Writer:
        count, first = max(1, int(scene.granules * part)), int(start * scene.granules)
        position = 0.0

        def writes(_: random.Random, at_s: float) -> list[int]:
            nonlocal position
            before, position = position, position + share * scene.rate * STEP_S
            return [
                (first + at % count) % scene.granules for at in range(int(before), int(position))
            ]

        return Writer(writes, GRANULARITY)

    return guest


def by_turns(guest: Guest, busy: float, idle: float) -> Guest:
    """Both are parts of the time that the copy takes."""

    def made(scene: Scene) -> Writer:
        writer, period_s = guest(scene), (busy + idle) * scene.full_s
        return Writer(
            lambda rng, at_s: (
                writer.writes(rng, at_s) if at_s % period_s < busy * scene.full_s else ()
            ),
            writer.bytes_each,
        )

    return made


def until(guest: Guest, part: float) -> Guest:
    """Then it is quiet."""
    return by_turns(guest, part, 1e9)


class World:
    """`rate`: what the copier takes, as part of the scene's, by time. `leaves_hot`: what is hot is
    copied last."""

    def __init__(
        self,
        guests: Guest | Sequence[Guest],
        scene: Scene | None = None,
        rate: Callable[[float], float] = lambda _: 1.0,
        *,
        leaves_hot: bool = True,
    ) -> None:
        self.scene = scene = scene or Scene()
        self.dirty = DirtyBitmap(scene.granules * GRANULARITY, GRANULARITY)
        self.dirty.mark_all()
        self.outlook = Outlook(self.dirty)
        self.hot = HotLast(self.dirty)
        self.now_s = 0.0
        self.said: list[tuple[float, Prediction]] = []
        """When what was predicted. About forty times in a copy without guests."""
        self.first_s: float | None = None
        """When the first pass over the disk had ended."""
        found = guests if isinstance(guests, Sequence) else [guests]
        self._writers = [guest(scene) for guest in found]
        self._rate, self._rng = rate, random.Random(scene.seed)
        self._cursor, self._room, self.sent, self._written = 0, 0.0, 0, 0
        self._leaves_hot = leaves_hot
        self.copied_s = [0.0] * scene.granules
        """When each granule was copied last."""

    def step(self) -> bool:
        """Whether the mirror is in sync at the end of the step."""
        for writer in self._writers:
            for granule in writer.writes(self._rng, self.now_s):
                self.dirty.mark(granule * GRANULARITY, GRANULARITY)
                self._written += writer.bytes_each
        self._room += self.scene.rate * self._rate(self.now_s) * STEP_S
        while self._room >= 1:
            run = self._next_run()
            if self._room < 1:
                break  # the copier rests
            if run is None:
                return True
            self.dirty.clear(*run)
            self._cursor = sum(run)
            first, count = (length // GRANULARITY for length in run)
            self.copied_s[first : first + count] = [self.now_s] * count
            self.sent += run[1]
            self._room -= count
        self.now_s += STEP_S
        hot = self.hot if self._leaves_hot else None
        self.outlook.look(self.now_s, self._cursor, self.sent, 0, hot, self._written)
        self.hot.look(self.now_s, self._cursor, self.outlook.rate)
        return False

    def _next_run(self) -> tuple[int, int] | None:
        room = int(self._room) * GRANULARITY
        if self._cursor:
            run = (self.hot.held or self.dirty).next_run(self._cursor, room)
            if run is not None:
                return run
            self.first_s = self.first_s or self.now_s
            if self._leaves_hot:
                self.hot.end_round(self.now_s)
        self._cursor = 0
        if self.now_s < self.hot.rest_until_s:
            self._room = 0.0
            return None
        self.hot.begin_round(is_hurried=self._leaves_hot)
        run = (self.hot.held or self.dirty).next_run(0, room)
        return run or self.dirty.next_run(0, room)

    def run(self, most: float) -> float | None:
        """When the mirror is in sync; None: not within so many times of what a copy takes."""
        every_s = self.scene.full_s / 40
        due_s = every_s
        while self.now_s < most * self.scene.full_s:
            if self.step():
                return self.now_s
            if self.now_s >= due_s:
                due_s += every_s
                if (found := self.outlook.predict(self.now_s)) is not None:
                    self.said.append((self.now_s, found))
        return None

    def late(self) -> list[tuple[float, Prediction]]:
        """What was predicted in the second half of the first pass, and later."""
        assert self.first_s is not None
        return [(at_s, found) for at_s, found in self.said if at_s >= self.first_s / 2]
