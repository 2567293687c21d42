"""Points from a disk in use to a journal, with the real writer: what is recovered is the content at
the cut of the last committed point."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from support.seeds import SEED, print_seed
from unit.disk.ledgerthreads import WAIT_S, running
from unit.mirror.pointparts import PointScene
from unit.points.pointparts import SECOND_NS, FarSide

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.errors import DeviceError
from nbdmirror.mirror.frozen_view import Chunk
from nbdmirror.mirror.point_sender import TURN_S, PointSender
from nbdmirror.points.format import RING_START
from nbdmirror.points.requests import Side
from nbdmirror.points.writer import JournalFull

SIZE = 256 << 10
POINTS = 12


class Replica:
    """A disk, and a far side with a journal that holds `ring_bytes`."""

    def __init__(self, ring_bytes: int = 32 << 20) -> None:
        self.far = FarSide(SIZE, RING_START + ring_bytes)
        self.scene = PointScene(MemoryDevice(SIZE))
        self.told: list[BaseException | None] = []
        self.sender = PointSender(
            self.far.writer,
            self.scene.loop,
            on_committed=lambda: self.told.append(None),
            on_broken=self.told.append,
        )
        self.scene.points._on_chunk = self.sender.chunk
        self.scene.points._on_more = self.sender.pump
        self.scene.points._on_broken = self.sender.broken
        self.scene.at_take = self.note
        self.cut = self.committed = bytes(SIZE)
        self.far.run(self.far.writer.seed(since_ns=0))

    def note(self) -> None:
        assert isinstance(self.scene.device, MemoryDevice)
        self.cut = bytes(self.scene.device.data)

    def point(self) -> BaseException | None:
        """Make a point; returns why it is broken, or None."""
        assert self.scene.cut(WAIT_S)
        count = len(self.told)
        self.sender.begin(self.scene.points, len(self.told) * SECOND_NS + SECOND_NS)
        self.scene.until(lambda: len(self.told) > count)
        if self.told[-1] is None:
            self.committed = self.cut
        return self.told[-1]

    def check(self) -> None:
        """Recover the newest point from copies of both exports."""
        copy = FarSide(SIZE, self.far.journal.size)
        copy.image.data[:], copy.journal.data[:] = self.far.image.data, self.far.journal.data
        copy.recover()
        assert copy.image.data == self.committed


def guest(replica: Replica, number: int, over: threading.Event) -> Callable[[], None]:
    chance = random.Random(f"{SEED}-{number}")

    def run() -> None:
        disk = replica.scene.disk
        while not over.is_set():
            offset, length = chance.randrange(SIZE - 9000), chance.randrange(1, 9000)
            if chance.random() < 0.8:
                disk.pwrite(chance.randbytes(length), offset, False)
            else:
                disk.zero(offset, length, may_trim=True, fua=False, fast=False)

    return run


def test_what_is_recovered_is_the_content_at_the_cut() -> None:
    print_seed()
    replica = Replica()
    over = threading.Event()
    with running(*(guest(replica, number, over) for number in range(2))):
        try:
            for _ in range(POINTS):
                assert replica.point() is None
                replica.check()
        finally:
            over.set()
    assert replica.point() is None
    replica.check()
    assert replica.scene.lag.lag_s == 0


def test_a_write_that_fails_breaks_the_point_and_the_next_one_has_all() -> None:
    replica = Replica()
    replica.scene.disk.pwrite(b"a" * 4096, 0, False)
    assert replica.point() is None
    export = replica.far.exports[Side.JOURNAL]
    replica.scene.disk.pwrite(b"b" * 4096, 8192, False)
    export.failing.add("write")
    assert isinstance(replica.point(), OSError)
    replica.check()
    export.failing.clear()
    replica.scene.disk.pwrite(b"c" * 4096, 16384, False)
    assert replica.point() is None
    replica.check()


def test_a_point_that_does_not_fit_is_broken_and_nothing_is_written() -> None:
    replica = Replica(1 << 20)
    while True:
        replica.scene.disk.pwrite(random.Random(1).randbytes(SIZE), 0, False)
        if (error := replica.point()) is not None:
            break
        replica.check()
    assert isinstance(error, JournalFull)
    replica.check()


@pytest.mark.parametrize("when", ["sending", "committing", "committing at once"])
def test_a_point_can_be_given_up(when: str) -> None:
    """While it is committed, the far side may have it, and the next point has its content too."""
    replica = Replica()
    replica.scene.disk.pwrite(b"a" * 4096, 0, False)
    assert replica.point() is None
    replica.scene.disk.pwrite(b"b" * 4096, 0, False)
    assert replica.scene.cut()
    reason = DeviceError("the user asked for it")
    if when == "sending":
        replica.scene.points.break_off(reason)
    else:
        commit = replica.far.writer.commit

        def late(done: object) -> None:
            replica.scene.points.break_off(reason)
            if when == "committing":
                replica.scene.loop.call_soon(lambda: commit(done))  # type: ignore[arg-type]
            else:
                commit(done)  # type: ignore[arg-type]

        replica.far.writer.commit = late  # type: ignore[method-assign]
    count = len(replica.told)
    replica.sender.begin(replica.scene.points, SECOND_NS * 9)
    replica.scene.until(lambda: len(replica.told) > count)
    replica.scene.loop.run_once(0.0)
    assert replica.told[count:] == [reason]
    if when != "sending":
        replica.far.writer.commit = commit  # type: ignore[method-assign]
        replica.committed = replica.cut
    replica.check()
    replica.scene.disk.pwrite(b"c" * 4096, 4096, False)
    assert replica.point() is None
    replica.check()


READ_S = TURN_S / 4
TURN_READS = 5
"""The clock is looked at after each."""


class Turns:
    """A loop, a view without an end and a writer: each read takes READ_S, each request stays in
    flight."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.posted: list[Callable[[], None]] = []
        self.in_flight: list[Callable[[BaseException | None], None]] = []
        self.reads = self.settled_chunks = 0
        self.in_flight_bytes, self.is_settled = 0, False
        covered = SimpleNamespace(dirty_bytes=0)
        changes = SimpleNamespace(frozen=SimpleNamespace(covered=covered))
        points: Any = SimpleNamespace(view=self, changes=changes)
        fake: Any = self
        self.sender = PointSender(fake, fake, on_committed=lambda: None, on_broken=lambda _: None)
        self.sender.begin(points, 0)

    def clock(self) -> float:
        return self.now_s

    def call_soon(self, call: Callable[[], None]) -> None:
        self.posted.append(call)

    def read_next(self) -> bool:
        self.now_s += READ_S
        self.reads += 1
        self.sender.chunk(Chunk([]))
        return True

    def settled(self, chunk: Chunk) -> None:
        self.settled_chunks += 1

    def begin(self, *_: object, **__: object) -> None:
        pass

    def put(self, runs: object, done: Callable[[BaseException | None], None]) -> None:
        self.in_flight.append(done)

    def turn(self) -> int:
        """Returns how many chunks were read."""
        before, (call,) = self.reads, self.posted
        self.posted.clear()
        call()
        return self.reads - before


def test_a_turn_of_the_loop_is_short_however_much_there_is_to_read() -> None:
    """Guests that were held at the cut wait for it, and so do other disks."""
    turns = Turns()
    assert turns.reads <= TURN_READS
    for _ in range(100):
        assert 1 <= turns.turn() <= TURN_READS


def test_chunks_that_went_as_one_request_end_in_one_short_turn() -> None:
    turns = Turns()
    while len(turns.in_flight) < 1000:
        turns.turn()
    reads = turns.reads
    for done in turns.in_flight[:1000]:
        done(None)
    assert turns.settled_chunks == 1000
    assert turns.reads == reads, "nothing is read before others had their turn"
    assert turns.turn() <= TURN_READS
