"""When the server's threads are put on one processor: while guests have more requests there."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from nbdmirror.nbdkit_host.placement import (
    LOOK_S,
    RATE_MIN,
    REST_LOOK_S,
    Placement,
    ProcessorBinding,
)

BUSY = 10 * RATE_MIN


@dataclass
class World:
    """Guests whose rate depends on where the threads are, under a clock that is held still."""

    free: float
    bound: float
    has_choice: bool = True
    is_bound: bool = False
    now_s: float = 0.0
    bound_s: float = 0.0
    binds: int = 0
    looks: int = 0
    count: float = 0.0
    noise: float = 0.0
    random: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.placement = Placement(self, lambda: int(self.count), lambda: self.now_s)
        self._course = self.placement.course()

    def aim(self) -> None:
        assert not self.is_bound, "the processor is chosen where the scheduler put the threads"

    def bind(self) -> None:
        self.is_bound = True
        self.binds += 1

    def release(self) -> None:
        self.is_bound = False

    def go_on(self, seconds: float) -> float:
        """Returns which part of that time the threads were bound."""
        began_s, self.bound_s = self.now_s, 0.0
        while self.now_s < began_s + seconds:
            wait_s = next(self._course)
            self.looks += 1
            self.now_s += wait_s
            rate = self.bound if self.is_bound else self.free
            rate *= 1 + self.random.uniform(-self.noise, self.noise)
            self.count += rate * wait_s
            self.bound_s += wait_s * self.is_bound
        return self.bound_s / (self.now_s - began_s)


def test_threads_are_bound_where_guests_gain() -> None:
    world = World(free=BUSY, bound=1.5 * BUSY)
    world.go_on(1.0)
    assert world.is_bound
    assert world.go_on(600.0) > 0.99


@pytest.mark.parametrize("gain", [0.5, 0.9, 1.0, 1.04])
def test_threads_are_left_to_the_scheduler_where_guests_do_not_gain(gain: float) -> None:
    world = World(free=BUSY, bound=gain * BUSY)
    assert world.go_on(600.0) < 0.005
    assert world.binds, "it was tried"


def test_guests_with_few_requests_are_never_tried() -> None:
    world = World(free=RATE_MIN * 0.9, bound=RATE_MIN * 2)
    assert world.go_on(600.0) == 0
    assert not world.binds


def test_threads_are_released_when_guests_rest() -> None:
    world = World(free=BUSY, bound=1.5 * BUSY)
    world.go_on(10.0)
    assert world.is_bound
    world.free = world.bound = 0
    world.go_on(2 * LOOK_S)
    assert not world.is_bound


def test_a_long_rest_is_looked_at_more_rarely_and_ends_soon() -> None:
    """Each look asks all disks, and there may be hundreds. Looks of others count a few requests."""
    world = World(free=0, bound=0)
    world.go_on(60.0)
    world.free = world.bound = 100.0
    looks = world.looks
    world.go_on(60.0)
    assert world.looks - looks <= 60 / REST_LOOK_S + 1
    world.free, world.bound = BUSY, 1.5 * BUSY
    world.go_on(1.0 + REST_LOOK_S)
    assert world.is_bound
    looks = world.looks
    world.go_on(1.0)
    assert world.looks - looks >= 0.9 / LOOK_S, "the next rest is not a long one yet"


@pytest.mark.parametrize(("first", "then"), [(1.5, 0.6), (0.6, 1.5)])
def test_another_load_is_tried_soon(first: float, then: float) -> None:
    """A guest with one large request in place of many small ones, or a processor that somebody else
    keeps busy; and back. The trials have become rare by then."""
    world = World(free=BUSY, bound=first * BUSY)
    world.go_on(600.0)
    assert world.is_bound is (first > 1)
    world.free, world.bound = BUSY / 2, then * BUSY / 2
    world.go_on(1.5)
    assert world.is_bound is (then > 1)


def test_another_outcome_at_the_same_rate_is_found_in_time() -> None:
    world = World(free=BUSY, bound=BUSY / 2)
    world.go_on(600.0)
    world.bound = 2 * BUSY
    world.go_on(61.0)
    assert world.is_bound


@pytest.mark.parametrize("gain", [0.5, 1.5])
def test_guests_that_rest_now_and_then_are_not_tried_each_time(gain: float) -> None:
    world = World(free=BUSY, bound=gain * BUSY)
    world.go_on(300.0)
    bound_s = 0.0
    for _ in range(100):
        world.free = world.bound = 0
        world.go_on(1.0)
        assert not world.is_bound
        world.free, world.bound = BUSY, gain * BUSY
        bound_s += world.go_on(1.0)
    assert bound_s > 70 if gain > 1 else bound_s < 1


@pytest.mark.parametrize("seed", range(10))
def test_rates_that_waver(seed: int) -> None:
    world = World(free=BUSY, bound=1.5 * BUSY, noise=0.2, random=random.Random(seed))
    world.go_on(1.0)
    assert world.go_on(120.0) > 0.9


@pytest.mark.parametrize("gain", [0.5, 1.5])
@pytest.mark.parametrize("after_s", [0.1, 0.3, 0.32, 0.4, 10.0, 10.2])
def test_whoever_places_the_threads_by_hand_is_obeyed(gain: float, after_s: float) -> None:
    """In the midst of a trial, too."""
    world = World(free=BUSY, bound=gain * BUSY)
    world.go_on(after_s)
    world.has_choice = False
    binds, is_bound = world.binds, world.is_bound
    with pytest.raises(StopIteration):
        world.go_on(10.0)
    assert (world.binds, world.is_bound) == (binds, is_bound)


# The real threads of this process.


def places() -> set[frozenset[int]]:
    found = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            found.add(frozenset(os.sched_getaffinity(int(thread))))
    return found


@contextlib.contextmanager
def waiting_threads(count: int) -> Iterator[Callable[[], None]]:
    over = threading.Event()
    threads: list[threading.Thread] = []

    def more() -> None:
        threads.append(threading.Thread(target=over.wait))
        threads[-1].start()

    for _ in range(count):
        more()
    try:
        yield more
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.fixture
def allowed() -> Iterator[frozenset[int]]:
    """The processors of this process, which a test changes."""
    (before,) = places()
    yield before
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), before)


def test_every_thread_is_bound_and_released(allowed: frozenset[int]) -> None:
    binding = ProcessorBinding()
    with waiting_threads(4) as more:
        binding.aim()
        binding.bind()
        (bound,) = places()
        assert len(bound) == 1 and bound <= allowed
        more()
        binding.bind()
        assert places() == {bound}
        binding.release()
        assert places() == {allowed}
        binding.release()
        assert places() == {allowed}


def test_a_process_on_one_processor_stays_there(allowed: frozenset[int]) -> None:
    os.sched_setaffinity(0, {min(allowed)})
    assert not ProcessorBinding().has_choice


def test_threads_that_were_placed_by_hand_are_noticed(allowed: frozenset[int]) -> None:
    if len(allowed) < 2:
        assert not ProcessorBinding().has_choice
        return
    binding = ProcessorBinding()
    assert binding.has_choice
    binding.aim()
    binding.bind()
    assert binding.has_choice
    os.sched_setaffinity(0, allowed)
    assert not binding.has_choice


def test_a_process_without_proc_is_left_alone(
    allowed: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(path: str) -> list[str]:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "listdir", missing)
    binding = ProcessorBinding()
    binding.aim()
    binding.bind()
    assert binding.has_choice is (len(allowed) == 1), "nothing was bound"
    monkeypatch.undo()
    assert places() == {allowed}
