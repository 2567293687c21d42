"""When guests that share a connection get connections of their own. The clock is the test's."""

from __future__ import annotations

import pytest

from nbdmirror.nbdclient.demand import REQUESTS, REQUESTS_S, SURPLUS, Demand


class Guest:
    """Sends requests on the shared connection."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.demand = Demand(lambda: self.now_s)

    def sends(
        self, number: int, per_s: float, *, in_use: bool = False, detour: bool = False
    ) -> int:
        """Send so many requests, one after the other. Returns after how many of them the first link
        was wanted; 0: none was."""
        wanted = 0
        for count in range(1, number + 1):
            self.now_s += 1 / per_s
            if self.demand.grows(is_in_use=in_use, is_detour=detour):
                wanted = wanted or count
        return wanted


def test_a_guest_with_little_to_do_gets_none() -> None:
    """Some of its requests come at once, and now and then it makes up for a delay."""
    guest = Guest()
    for _ in range(100):
        assert not guest.sends(100, 1500.0)
        assert not guest.sends(20, 1500.0, in_use=True)
        assert not guest.sends(SURPLUS // 2, 20_000.0, in_use=True)


def test_a_guest_whose_requests_come_quickly_gets_one() -> None:
    guest = Guest()
    assert not guest.sends(REQUESTS, 10.0)
    assert 0 < guest.sends(2 * REQUESTS, 2 * REQUESTS / REQUESTS_S) <= REQUESTS


def test_requests_that_always_wait_get_one_however_slow_they_are() -> None:
    assert Guest().sends(REQUESTS, 10.0, in_use=True) == SURPLUS


def test_what_was_wanted_is_not_wanted_again_at_once() -> None:
    guest = Guest()
    assert guest.sends(SURPLUS, 10.0, in_use=True)
    assert not guest.sends(SURPLUS - 1, 10.0, in_use=True)
    assert guest.sends(1, 10.0, in_use=True)


@pytest.mark.parametrize("per_s", [10.0, 100_000.0])
def test_a_guest_that_waits_for_the_loop_gets_one(per_s: float) -> None:
    assert Guest().sends(REQUESTS, per_s, detour=True) == REQUESTS
