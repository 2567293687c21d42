"""The shares of a mirror's time are right in each situation that can be made on purpose, to the
millisecond of a clock that stands still, and add up to one in all others."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from support.seeds import SEED
from unit.mirror.copierparts import Clock
from unit.mirror.jobdevices import StillLoop
from unit.mirror.jobparts import GRANULARITY, NO_SPACE, SIZE, JobWorld
from unit.mirror.snapshotparts import INTERVAL_S, SnapshotsWorld

from nbdmirror.mirror.activity import Activity
from nbdmirror.mirror.in_flight import CopierLoad
from nbdmirror.mirror.options import CopyMode, Policy
from nbdmirror.mirror.waits import RECENT_S, Cause, Waits

CLAIMS = SIZE // GRANULARITY
ONE_SLOT = GRANULARITY


def delayed(world: JobWorld, **delays_s: float) -> JobWorld:
    for requests in (world.source.requests, world.target.requests):
        requests.delays_s = delays_s
    return world


def total(world: JobWorld) -> dict[str, float]:
    """The causes that the job's time had, with their shares since the start."""
    return {str(cause): share for cause, share in world.job.waits.shares.total.items() if share}


def recent(world: JobWorld) -> dict[str, float]:
    return {str(cause): share for cause, share in world.job.waits.shares.recent.items() if share}


def spent(world: JobWorld, seconds: float) -> dict[str, float]:
    """What the next seconds are spent on, in seconds."""
    before = world.job.waits.shares.seconds
    pass_s(world, seconds)
    after = world.job.waits.shares.seconds
    found = {str(cause): round(after[cause] - before[cause], 9) for cause in after}
    assert math.isclose(sum(found.values()), seconds)
    return {cause: passed_s for cause, passed_s in found.items() if passed_s}


def pass_s(world: JobWorld, seconds: float) -> None:
    """As on a server, which looks once a second."""
    whole, part = divmod(seconds, 1)
    for _ in range(int(whole)):
        world.pass_s(1)
        world.job.waits.look()
    world.pass_s(part)


@pytest.mark.parametrize("slots", [1, CLAIMS])
@pytest.mark.parametrize(
    ("read_s", "write_s", "shares"),
    [
        (0.09, 0.01, {"source-read": 0.9, "target-write": 0.1}),
        (0.02, 0.08, {"source-read": 0.2, "target-write": 0.8}),
        (0.0, 0.1, {"target-write": 1.0}),
        (0.1, 0.0, {"source-read": 1.0}),
    ],
)
def test_a_slow_source_and_a_slow_target(
    slots: int, read_s: float, write_s: float, shares: dict[str, float]
) -> None:
    world = JobWorld(buffer_bytes=slots * GRANULARITY)
    delayed(world, read=read_s, write=write_s).start()
    while world.status == "running":
        world.pass_s(0.01)
    spent_s = world.job.waits.shares.seconds
    copying_s = sum(spent_s[cause] for cause in (Cause.SOURCE_READ, Cause.TARGET_WRITE))
    for cause in (Cause.SOURCE_READ, Cause.TARGET_WRITE):
        assert spent_s[cause] / copying_s == pytest.approx(shares.get(cause, 0), abs=1e-6)
    if slots == 1:
        assert copying_s == pytest.approx(0.1 * CLAIMS)
    world.assert_identical()


@pytest.mark.parametrize("slots", [1, 3, CLAIMS])
@pytest.mark.parametrize(("read_s", "write_s"), [(0.1, 0.0), (0.0, 0.1), (1 / 3, 1 / 7)])
def test_who_asks_changes_nothing(slots: int, read_s: float, write_s: float) -> None:
    """Also not by what rounding leaves: a job that waits for nothing has nothing to do."""
    found = []
    for is_asked in (False, True):
        world = JobWorld(buffer_bytes=slots * GRANULARITY)
        if is_asked:
            world.loop.after_step.append(world.shares)
        delayed(world, read=read_s, write=write_s).start()
        while world.status == "running":
            world.pass_s(0.01)
        found.append(world.job.waits.shares.seconds)
        world.assert_identical()
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert min(found[1].values()) > -1e-9


def test_a_source_that_is_slow_to_say_what_is_allocated() -> None:
    world = delayed(JobWorld(buffer_bytes=ONE_SLOT), extents=0.3).start()
    world.pass_s(0.2)
    assert total(world) == {"source-read": 1.0}


def test_a_scan_of_the_source() -> None:
    world = JobWorld(sync="top")
    world.resources.holds = {"scan"}
    world.start()
    assert spent(world, 9.0) == {"source-read": 9.0}


def test_a_slow_flush_before_ready() -> None:
    world = delayed(JobWorld(buffer_bytes=ONE_SLOT), write=0.1, flush=4.0).start()
    pass_s(world, 0.1 * CLAIMS)
    assert spent(world, 3.0) == {"target-flush": 3.0}
    assert world.job.waits.shares.now is Cause.TARGET_FLUSH
    assert total(world) == {"target-write": round(1.6 / 4.6, 4), "target-flush": round(3 / 4.6, 4)}


def test_slow_flushes_beside_a_guest() -> None:
    """A flush and the writes beside it are counted alike."""
    world = delayed(JobWorld(buffer_bytes=ONE_SLOT), flush=1.0, write=1.0).ready_after(30.0)
    world.target.requests.holds = {"flush", "write"}
    world.write()
    pass_s(world, 5.0)
    world.target.requests.answer("write")
    pass_s(world, 5.0)
    assert world.target.requests.held[0][0] == "flush"
    world.write()
    pass_s(world, 1.0)
    assert [kind for kind, _ in world.target.requests.held] == ["flush", "write"]
    assert spent(world, 8.0) == {"target-flush": 4.0, "target-write": 4.0}


def test_a_hung_target_counts_although_nothing_ends() -> None:
    world = JobWorld()
    world.target.requests.holds = {"write"}
    world.start()
    assert spent(world, 120.0) == {"target-write": 120.0}
    assert recent(world) == {"target-write": 1.0}
    assert world.job.waits.shares.now is Cause.TARGET_WRITE


def test_a_hung_source_counts_although_nothing_ends() -> None:
    world = JobWorld()
    world.source.requests.holds = {"read"}
    world.start()
    assert spent(world, 120.0) == {"source-read": 120.0}


def test_a_speed_limit() -> None:
    world = JobWorld(buffer_bytes=ONE_SLOT, speed_bytes_per_s=10 * GRANULARITY).start()
    assert spent(world, 1.0) == {"speed-limit": 1.0}
    assert world.job.waits.shares.now is Cause.SPEED_LIMIT
    assert world.status == "running"


def test_a_speed_limit_that_does_not_matter() -> None:
    """The target is slower than the limit, or there is nothing to copy."""
    world = JobWorld(buffer_bytes=ONE_SLOT, speed_bytes_per_s=100 * GRANULARITY)
    delayed(world, write=0.1).start()
    assert spent(world, 1.0) == {"target-write": 1.0}
    world = JobWorld(speed_bytes_per_s=GRANULARITY).ready_after(30.0)
    world.write()
    world.pass_s(0.5)  # the limit would hold back a second write now, but there is none
    assert world.job.tracker.in_sync
    assert spent(world, 0.1) == {"nothing-to-do": 0.1}


def test_a_limit_that_is_raised() -> None:
    world = JobWorld(buffer_bytes=ONE_SLOT, speed_bytes_per_s=GRANULARITY).start()
    assert spent(world, 2.0) == {"speed-limit": 2.0}
    world.job.set_speed(0)
    world.settle()
    world.pass_s(0.1)
    assert world.status == "ready"
    assert spent(world, 2.0) == {"nothing-to-do": 2.0}


@pytest.mark.parametrize("guests_per_s", [0, 1000])
def test_a_copy_that_yields_to_guests(guests_per_s: int) -> None:
    loop = StillLoop()
    asked_s = [loop.clock()]

    def new_requests() -> int:
        passed_s, asked_s[0] = loop.clock() - asked_s[0], loop.clock()
        return round(guests_per_s * passed_s)

    load = CopierLoad(loop.clock, new_requests, processors=1)
    size = 1024 * GRANULARITY
    world = JobWorld(loop=loop, load=load, size=size, buffer_bytes=8 << 20)
    delayed(world, read=0.02, write=0.001).start()
    world.pass_s(0.15)
    expected = "yielding" if guests_per_s else "source-read"
    found = spent(world, 0.1)
    if guests_per_s:
        assert found == {"yielding": 0.1}
    else:
        assert "yielding" not in found
    assert max(found, key=lambda cause: found[cause]) == expected
    world.pass_s(5.0)
    assert world.status == "ready"
    world.assert_identical()


def test_an_idle_mirror() -> None:
    world = JobWorld().ready()
    assert spent(world, 100.0) == {"nothing-to-do": 100.0}
    assert recent(world) == {"nothing-to-do": 1.0}


@pytest.mark.parametrize("is_ready", [False, True])
def test_a_paused_job(is_ready: bool) -> None:
    world = JobWorld(buffer_bytes=ONE_SLOT)
    if is_ready:
        world.ready()
    else:
        delayed(world, write=0.1).start()
    world.job.pause()
    world.pass_s(1.0)
    assert world.status == ("standby" if is_ready else "paused")
    assert spent(world, 65.0) == {"paused": 65.0}
    assert world.job.waits.shares.now is Cause.PAUSED
    assert recent(world) == {"paused": 1.0}
    world.job.resume()
    world.settle()
    assert world.job.waits.shares.now is not Cause.PAUSED
    world.target.requests.delays_s = {}
    world.pass_s(5.0)
    assert spent(world, 3.0) == {"nothing-to-do": 3.0}


def test_a_job_that_an_error_has_stopped() -> None:
    world = JobWorld(on_target_error=Policy.STOP)
    world.target.requests.errors = {"write": NO_SPACE}
    world.start()
    world.pass_s(1.0)
    assert world.status == "paused"
    assert spent(world, 60.0) == {"error": 60.0}
    assert world.job.waits.shares.now is Cause.ERROR


def test_a_job_that_tries_again() -> None:
    world = JobWorld(on_target_error=Policy.IGNORE)
    world.target.requests.errors = {"write": NO_SPACE}
    world.start()
    assert spent(world, 60.0) == {"error": 60.0}


def test_a_lost_target() -> None:
    world = JobWorld(reconnect_delay_s=600.0).ready()
    world.resources.holds = {"reconnect"}
    world.target.requests.is_lost = True
    world.write()
    world.pass_s(1.0)
    assert world.job.activity is Activity.RECONNECTING
    assert spent(world, 90.0) == {"reconnecting": 90.0}
    assert world.job.waits.shares.now is Cause.RECONNECTING
    world.resources.answer()
    world.pass_s(1.0)
    assert spent(world, 5.0) == {"nothing-to-do": 5.0}
    world.assert_identical()


def test_a_lost_source() -> None:
    world = JobWorld()
    world.resources.holds = {"reconnect_source"}
    world.source.requests.is_lost = True
    world.start()
    assert spent(world, 9.0) == {"reconnecting": 9.0}


def test_a_job_that_waits_to_be_finalized() -> None:
    world = JobWorld(auto_finalize=False).ready()
    world.job.complete()
    world.pass_s(1.0)
    assert world.status == "pending"
    assert spent(world, 9.0) == {"nothing-to-do": 9.0}


def test_synchronous_writes_need_no_copier() -> None:
    world = JobWorld(copy_mode=CopyMode.WRITE_BLOCKING).ready()
    for _ in range(9):
        world.write()
        assert spent(world, 1.0) == {"nothing-to-do": 1.0}
    world.assert_identical()


@pytest.mark.parametrize(
    ("delays", "cause"),
    [
        ({"read": 0.4}, "source-read"),
        ({"write": 0.4}, "target-write"),
        ({"flush": 0.4}, "target-flush"),
    ],
)
def test_a_point_that_takes_its_time(delays: dict[str, float], cause: str) -> None:
    """Also one whose request hangs: nothing else may be said than what is waited for."""
    world = SnapshotsWorld().ready_with_points()
    assert spent(world, 5) == {"nothing-to-do": 5}
    delayed(world, **delays)
    world.write()
    found = spent(world, 4)
    assert found.pop("acknowledgement") + found.pop("nothing-to-do", 0) == pytest.approx(3.6)
    assert found == {cause: pytest.approx(0.4)}
    world.ack()
    delayed(world, **dict.fromkeys(delays, math.inf))
    world.write()
    world.pass_s(INTERVAL_S + 1)
    assert spent(world, 100) == {cause: 100}
    assert world.job.waits.shares.now == cause


def test_a_point_that_waits_for_its_acknowledgement() -> None:
    world = SnapshotsWorld().ready_with_points()
    world.write()
    world.awaits()
    assert spent(world, 100) == {"acknowledgement": 100}
    world.job.acknowledge(world.acks.awaited, "no room")
    world.settle()
    world.awaits()
    world.ack()
    assert spent(world, 100) == {"nothing-to-do": 100}


def test_the_time_after_the_end_does_not_count() -> None:
    world = JobWorld(auto_dismiss=False).ready()
    world.job.complete()
    world.pass_s(1.0)
    assert world.status == "concluded"
    shares = world.job.waits.shares
    world.pass_s(500.0)
    world.job.waits.look()
    assert world.job.waits.shares == shares


def test_the_last_minute_forgets_what_was_before() -> None:
    world = JobWorld()
    world.target.requests.holds = {"write"}
    world.start()
    pass_s(world, 300.0)
    world.target.requests.answer_all()
    world.pass_s(0.5)
    pass_s(world, RECENT_S / 2)
    shares = world.job.waits.shares
    assert shares.recent[Cause.TARGET_WRITE] == pytest.approx(0.5, abs=0.1)
    assert shares.now is Cause.NOTHING_TO_DO
    pass_s(world, RECENT_S)
    assert recent(world) == {"nothing-to-do": 1.0}
    assert total(world)["target-write"] == pytest.approx(300 / 390.5, abs=1e-3)


def test_before_any_time_has_passed() -> None:
    waits = Waits(Clock())
    assert waits.shares.total[Cause.NOTHING_TO_DO] == waits.shares.recent[Cause.NOTHING_TO_DO] == 1
    waits.doing(Activity.PAUSED, is_error=False)
    assert waits.shares.total[Cause.PAUSED] == 1


@pytest.mark.parametrize("number", range(20))
def test_the_shares_of_anything_add_up_to_one(number: int) -> None:
    """Also where requests begin and end in any order, and whatever holds the job back."""
    rng, clock = random.Random(SEED + number), Clock()
    clock.now_s = 1e7  # a host that has run for months
    waits = Waits(clock)
    copies = writes = flushes = 0

    def change() -> None:
        nonlocal copies, writes, flushes
        calls: list[Callable[[], object]] = [waits.copy_begins, waits.flush_begins, waits.look]
        calls += [lambda: waits.hold(rng.choice([None, Cause.SPEED_LIMIT, Cause.YIELDING]))]
        activities = [Activity.PAUSED, *[Activity.COPYING] * 3, Activity.RECONNECTING]
        calls += [lambda: waits.doing(rng.choice(activities), is_error=rng.random() < 0.5)]
        calls += [lambda: waits.write_begins(clock())] if copies > writes else []
        calls += [lambda: waits.write_ends(clock())] if writes else []
        calls += [waits.copy_ends] if copies > writes else []
        calls += [waits.flush_ends] if flushes else []
        number = rng.randrange(len(calls))
        call = calls[number]
        before = copies, writes, flushes
        call()
        copies, writes, flushes = waits._copies, waits._writes, waits.flushes
        assert sum(abs(a - b) for a, b in zip(before, (copies, writes, flushes), strict=True)) <= 1

    began_s = clock()
    for _ in range(400):
        clock.now_s += rng.choice([0, 1e-6, 1e-3, rng.random(), 30 * rng.random()])
        change()
        shares = waits.shares
        assert math.isclose(sum(shares.seconds.values()), clock() - began_s, abs_tol=1e-6)
        assert min(shares.seconds.values()) >= 0
        for parts in (shares.recent, shares.total):
            assert math.isclose(sum(parts.values()), 1)
            assert min(parts.values()) >= 0
