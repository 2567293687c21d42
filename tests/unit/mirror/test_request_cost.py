"""RequestCost, with targets that are simulated: each has a time for a request, one for a byte, and
a way there and back."""

from __future__ import annotations

import heapq
import random

import pytest
from support.seeds import SEED

from nbdmirror.mirror.request_cost import RequestCost

KIB, MIB = 1 << 10, 1 << 20
LONGEST = 64 * KIB


class Simulated:
    """Requests are done one after the other, and wait for that there."""

    def __init__(self, *, request_s: float, bytes_per_s: float, way_s: float = 0.0) -> None:
        self.request_s, self.bytes_per_s, self.way_s = request_s, bytes_per_s, way_s
        self.cost = RequestCost()
        self.now_s = 0.0
        self._free_s = 0.0
        self._in_flight: list[tuple[float, float, int]] = []

    def send(self, lengths: list[int], in_flight: int) -> None:
        """All of them, so many at a time."""
        for length in lengths:
            while len(self._in_flight) >= in_flight:
                self._answer()
            there_s = max(self._free_s, self.now_s + self.way_s / 2)
            self._free_s = there_s + self.request_s + length / self.bytes_per_s
            heapq.heappush(self._in_flight, (self._free_s + self.way_s / 2, self.now_s, length))
        while self._in_flight:
            self._answer()

    def _answer(self) -> None:
        self.now_s, began_s, length = heapq.heappop(self._in_flight)
        self.cost.answered(began_s, self.now_s, length)


def copied(target: Simulated, in_flight: int) -> Simulated:
    """A first copy, and rounds of what guests changed: mostly single blocks."""
    rng = random.Random(SEED)
    target.send([4 * KIB], 1)
    target.send([64 * KIB] * 100, in_flight)
    for _ in range(10):
        target.send([rng.choice((4, 4, 4, 4, 8, 32)) * KIB for _ in range(100)], in_flight)
    return target


@pytest.mark.parametrize("in_flight", [8, 64])
def test_where_each_request_costs_as_much_all_is_sent_with_it(in_flight: int) -> None:
    """A process for each of them."""
    target = Simulated(request_s=0.01, bytes_per_s=1e9)
    assert copied(target, in_flight).cost.in_bytes == LONGEST


@pytest.mark.parametrize("in_flight", [1, 2, 4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("way_s", [0.001, 0.02, 0.2])
def test_over_a_link_only_bytes_cost(in_flight: int, way_s: float) -> None:
    """However long the way is, and however much of the link is used: 100 bytes of a request's own
    are all that a gap may have."""
    target = Simulated(request_s=100 / 12.5e6, bytes_per_s=12.5e6, way_s=way_s)
    assert copied(target, in_flight).cost.in_bytes <= KIB


@pytest.mark.parametrize("in_flight", [16, 64])
def test_it_is_measured(in_flight: int) -> None:
    target = Simulated(request_s=100e-6, bytes_per_s=100e6)
    assert 8_000 <= copied(target, in_flight).cost.in_bytes <= 12_000


def test_a_link_that_becomes_slow_is_measured_again() -> None:
    target = copied(Simulated(request_s=8e-6, bytes_per_s=12.5e6, way_s=0.02), 128)
    target.bytes_per_s = 1.25e6
    for _ in range(20):
        gap = target.cost.in_bytes
        target.send([4 * KIB + gap] * 50 + [4 * KIB] * 50, 128)
    assert target.cost.in_bytes <= 4 * KIB


@pytest.mark.parametrize("lengths", [[], [4 * KIB], [MIB] * 100, [4 * KIB] * 100])
def test_it_is_unknown_at_first(lengths: list[int]) -> None:
    target = Simulated(request_s=0.01, bytes_per_s=1e9)
    target.send(lengths, 16)
    assert target.cost.in_bytes == 0
