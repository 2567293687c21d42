"""How long guests' requests take, and what of that is a mirror's doing. The clock stands still, but
where a test moves it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from support.waiting import InThread, wait_until

from nbdmirror.devices.base import Buffer, MemoryDevice
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.changes import Changes
from nbdmirror.disk.disk import Disk, SynchronousWrites
from nbdmirror.disk.fine import FineBitmap
from nbdmirror.disk.frozen import Frozen
from nbdmirror.disk.latency import (
    BUCKETS,
    NOTES_MAX,
    SAMPLED,
    TIMED_MIN,
    Held,
    Histogram,
    Kind,
    Latency,
)
from nbdmirror.disk.saved import SavedGranules
from nbdmirror.disk.throttle import Throttle
from nbdmirror.disk.tracker import Tracker

SIZE, GRANULE = 1 << 20, 4096
MS = 1_000_000


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


def served(clock: Clock, took_ns: int = 5 * MS, kind: type[Slow] | None = None) -> Disk:
    disk = Disk("d", (kind or Slow)(clock, took_ns))
    disk.ledger.latency.clock_ns = clock
    return disk


class Slow(MemoryDevice):
    """Each request takes `took_ns`."""

    def __init__(self, clock: Clock, took_ns: int) -> None:
        super().__init__(SIZE)
        self._clock, self.took_ns = clock, took_ns

    def read_part(self, buffers: tuple[memoryview], offset: int) -> int:
        return 0

    def write_part(self, buf: Buffer, offset: int) -> int:
        return 0

    def pread(self, buf: memoryview, offset: int) -> None:
        self._clock.now_ns += self.took_ns
        super().pread(buf, offset)

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        self._clock.now_ns += self.took_ns
        super().pwrite(buf, offset, fua)

    def flush(self) -> None:
        self._clock.now_ns += self.took_ns


def counted(histogram: Histogram) -> tuple[int, int]:
    """How many times, and their sum."""
    histogram.count()
    return sum(histogram.buckets), histogram.sum_ns


def nothing_else(found: Latency, *but: Histogram) -> bool:
    every = [*found.took.values(), *found.own.values(), *found.held.values()]
    return all(counted(one) == (0, 0) for one in every if one not in but)


@pytest.mark.parametrize(
    ("ns", "bucket"),
    [(0, 0), (999, 0), (1000, 1), (1999, 1), (2000, 2), (3999, 2), (4000, 3), (1000 * MS, 20),
     (8_388_607_999, 23), (8_388_608_000, 24), (10**15, BUCKETS - 1)],
)  # fmt: skip
def test_times_are_counted_by_their_size(ns: int, bucket: int) -> None:
    histogram = Histogram()
    histogram.add(ns)
    assert counted(histogram) == (1, ns)
    assert [at for at, count in enumerate(histogram.buckets) if count] == [bucket]


def test_notes_take_bounded_memory_and_none_is_lost() -> None:
    histogram = Histogram()

    def add() -> None:
        for _ in range(3 * NOTES_MAX):
            histogram.add(1000)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(histogram._notes) <= NOTES_MAX + len(threads)
    assert counted(histogram) == (12 * NOTES_MAX, 12 * NOTES_MAX * 1000)


@pytest.mark.parametrize("kind", [Kind.READ, Kind.WRITE])
def test_reads_and_writes_are_sampled(clock: Clock, kind: Kind) -> None:
    """One is timed, and the next ones are not, and all of them are done."""
    disk = served(clock)
    read = bytearray(1)
    for number in range(2 * SAMPLED + 1):
        if kind is Kind.READ:
            disk.pread(memoryview(read), number)
        else:
            disk.pwrite(b"x", number, False)
    assert clock.now_ns == (2 * SAMPLED + 1) * 5 * MS
    found = disk.ledger.latency
    took, own = found.took[kind], found.own[kind]
    assert counted(took) == counted(own) == (3, 3 * 5 * MS)
    assert nothing_else(found, took, own)
    if kind is Kind.WRITE:
        source = disk.source
        assert isinstance(source, MemoryDevice)
        assert source.data[: number + 1] == b"x" * (number + 1)


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        (Kind.ZERO, lambda disk: disk.zero(0, 512, may_trim=True, fua=False, fast=False)),
        (Kind.TRIM, lambda disk: disk.trim(0, 512, fua=False)),
        (Kind.FLUSH, lambda disk: disk.flush()),
    ],
)
def test_all_others_are_timed(clock: Clock, kind: Kind, request_: Callable[[Disk], None]) -> None:
    disk = served(clock)
    for _ in range(10):
        request_(disk)
    found = disk.ledger.latency
    assert counted(found.took[kind])[0] == counted(found.own[kind])[0] == 10
    assert nothing_else(found, found.took[kind], found.own[kind])


def test_a_request_that_fails_has_its_time_too(clock: Clock) -> None:
    class Failing(Slow):
        def flush(self) -> None:
            super().flush()
            raise OSError(5, "broken")

    disk = served(clock, kind=Failing)
    with pytest.raises(OSError, match="broken"):
        disk.flush()
    assert counted(disk.ledger.latency.took[Kind.FLUSH]) == (1, 5 * MS)


def check_share(found: Latency, cause: Held, *, own_ns: int, held_ns: int) -> None:
    """Of one write."""
    assert counted(found.held[cause]) == (1, held_ns)
    assert counted(found.own[Kind.WRITE]) == (1, own_ns)
    assert counted(found.took[Kind.WRITE]) == (1, own_ns + held_ns)
    named = (found.held[cause], found.own[Kind.WRITE], found.took[Kind.WRITE])
    assert nothing_else(found, *named)


@pytest.mark.parametrize(
    ("holds_flushes", "cause"), [(True, Held.PIVOT), (False, Held.CUT)], ids=["pivot", "cut"]
)
def test_a_closed_gate_is_a_mirrors_doing(clock: Clock, holds_flushes: bool, cause: Held) -> None:
    disk = served(clock)
    disk.ledger.close_gate(lambda: None, holds_flushes=holds_flushes)
    write = InThread(lambda: disk.pwrite(b"x", 0, False))
    gate = disk.ledger.gate
    assert gate is not None
    wait_until(lambda: gate.waiting, "the write waits")
    clock.now_ns += 7 * MS
    disk.ledger.open_gate()
    write.result()
    check_share(disk.ledger.latency, cause, own_ns=5 * MS, held_ns=7 * MS)


def test_saving_for_a_point_is_a_mirrors_doing(clock: Clock) -> None:
    """The read of what is overwritten, and waiting for that of somebody else."""
    disk = served(clock)
    changes = Changes(disk, GRANULE)
    changes.begin()
    changes.dirty.mark(0, GRANULE)
    changes.prepare()
    disk.ledger.close_gate(lambda: None, holds_flushes=False)

    def freeze(covered: FineBitmap, done: DirtyBitmap) -> Frozen:
        return Frozen(
            covered,
            done,
            SavedGranules(SIZE),
            on_broken=lambda: None,
            on_saved=lambda: None,
            latency=disk.ledger.latency,
        )

    changes.cut(freeze)
    disk.ledger.open_gate()
    disk.pwrite(b"x", 0, False)
    check_share(disk.ledger.latency, Held.SAVE, own_ns=5 * MS, held_ns=5 * MS)


def test_the_target_of_write_blocking_is_a_mirrors_doing(clock: Clock) -> None:
    disk, tracker = served(clock), Tracker(SIZE, GRANULE)
    disk.ledger.attach(tracker.dirty)
    disk.synchronous = SynchronousWrites(
        tracker=tracker,
        target=Slow(clock, 30 * MS),
        whole_granules=False,
        on_error=lambda error: None,
        latency=disk.ledger.latency,
    )
    disk.pwrite(b"x" * GRANULE, 0, False)
    check_share(disk.ledger.latency, Held.TARGET, own_ns=5 * MS, held_ns=30 * MS)


def test_a_throttle_is_a_mirrors_doing(clock: Clock) -> None:
    disk = served(clock)
    slowed = Throttle(disk.ledger, DirtyBitmap(SIZE, GRANULE), lambda: clock.now_ns / 1e9)

    def wait(seconds: float) -> None:
        clock.now_ns += round(seconds * 1e9)

    slowed.wait = wait
    slowed.limit(GRANULE * 100)
    for number in range(20):
        disk.pwrite(b"x", number * GRANULE, False)
    found = disk.ledger.latency
    count, held_ns = counted(found.held[Held.THROTTLE])
    assert (count, held_ns) == (20, clock.now_ns - 20 * 5 * MS)
    sampled = found.took[Kind.WRITE], found.own[Kind.WRITE]
    assert nothing_else(found, found.held[Held.THROTTLE], *sampled)


def test_what_a_mirror_costs_is_a_part_of_all_the_time() -> None:
    """Of writes one in SAMPLED is timed, of the others each, and each wait."""
    found = Latency()
    before = found.cost
    assert before.share_since(before) is None
    for _ in range(TIMED_MIN):
        found.own[Kind.WRITE].add(3 * MS)
        found.own[Kind.FLUSH].add(MS)
        found.own[Kind.READ].add(1000 * MS)
    after = found.cost
    assert after.share_since(before) == 0
    own_ns = TIMED_MIN * (3 * SAMPLED + 1) * MS
    found.held[Held.THROTTLE].add(own_ns)
    found.held[Held.PIVOT].add(2 * own_ns)
    assert found.cost.share_since(before) == pytest.approx(0.75)
    assert found.cost.share_since(after) is None, "no request was timed since then"
