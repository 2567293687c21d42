"""What users are told of what a mirror costs its guests."""

from __future__ import annotations

from unit.mirror.jobparts import JobWorld

from nbdmirror.disk.latency import TIMED_MIN, Held, Kind

LONG_NS, SHORT_NS = 1_000_000_000, 1000


def test_a_wait_that_was_short_is_not_told_as_none() -> None:
    """However long guests have worked without waiting."""
    world = JobWorld().start()
    latency = world.disk.ledger.latency
    for _ in range(TIMED_MIN):
        latency.own[Kind.FLUSH].add(LONG_NS)
    found = world.asking.ask()
    assert found["guests-wait-share"] == 0
    assert "no write, trim or flush of a guest has waited" in found["explanation"][-1]
    latency.held[Held.PIVOT].add(SHORT_NS)
    found = world.asking.ask()
    assert found["guests-wait-share"] > 0
    assert "spent less than 0.1 % of their time" in found["explanation"][-1]
