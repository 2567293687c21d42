"""An applier beside the image and the source that grants it points, step by step. All orders of
these steps, and what may go wrong between them: tests/model/test_applier.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from unit.points.pointparts import FarSide

from nbdmirror.errors import DeviceLost
from nbdmirror.points import applier, delegation
from nbdmirror.points.appliers_block import (
    BEAT_S,
    EXPORT_BYTES_MIN,
    GONE_S,
    ApplierBlock,
    Phase,
    Watch,
    read_block,
)
from nbdmirror.points.follower import LOOK_S, Follower
from nbdmirror.points.format import BLOCK_BYTES, JournalError, State, Superblock
from nbdmirror.points.reader import DamagedData
from nbdmirror.points.superblocks import JournalTaken


class Beside(FarSide):
    """With an applier, and a clock for both."""

    def __init__(self, disk_bytes: int = 64 << 10) -> None:
        super().__init__(disk_bytes, journal_bytes=EXPORT_BYTES_MIN)
        self.now_s = 0.0
        self.watch = Watch()
        self.numbers = itertools.count(1)
        self.fill(0, len(self.disk))
        self.seed()
        self.point((0, BLOCK_BYTES))
        self.applier = self.new_applier()

    def new_applier(self, other: ApplierBlock | None = None) -> Follower:
        applier = Follower(
            "journal",
            self.journal.size,
            self.image.size,
            number=next(self.numbers),
            clock=lambda: self.now_s,
        )
        self.run(applier.announce(other))
        return applier

    def look(self) -> Superblock:
        """The source's step towards an image that is the newest point."""
        newest = self.writer.newest.sequence
        self.run(delegation.follow(self.writer, newest, self.watch, lambda: self.now_s))
        return self.writer.superblocks.current

    def grant(self) -> Superblock:
        """The source sees that the applier lives."""
        self.look()
        self.now_s += BEAT_S
        self.run(self.applier.beat())
        return self.look()

    def said(self) -> ApplierBlock:
        found = self.run(read_block(self.writer.superblocks.current, self.journal.size))
        assert found is not None
        return found


@pytest.fixture
def far() -> Beside:
    return Beside()


def test_a_point_is_granted_and_done(far: Beside) -> None:
    assert not far.run(far.applier.step()), "there is no grant yet"
    block = far.grant()
    assert (block.applying, block.applier, block.base.sequence) == (1, 1, 0)
    assert [point.sequence for point in far.read().points] == [1]
    far.point((8 * BLOCK_BYTES, BLOCK_BYTES))
    assert far.run(far.applier.step())
    assert bytes(far.image.data) == far.contents[1], "and no later point"
    assert not far.run(far.applier.step()), "that is done, and the source has not looked"
    block = far.look()
    assert (block.applying, block.applier, block.base.sequence) == (0, 0, 1)
    assert block.samples and block.state is State.OK
    block = far.look()
    assert (block.applying, block.applier) == (2, 1)
    assert far.run(far.applier.step()) and far.look().base.sequence == 2
    assert bytes(far.image.data) == far.contents[2]
    assert far.writer.room().used_bytes == 0


def test_what_is_done_is_not_done_again_for_a_source_that_was_restarted(far: Beside) -> None:
    """That source sees that it is done, and takes the image back: a guest may have it then."""
    far.grant()
    assert far.run(far.applier.step())
    far.connect()  # another process, with a generation of its own
    assert far.writer.superblocks.current.applying == 1, "what the one before has granted"
    written = bytes(far.image.data)
    far.image.pwrite = _lost  # type: ignore[assignment]
    assert not far.run(far.applier.step())
    assert far.said().phase is Phase.DONE
    del far.image.pwrite
    assert far.look().base.sequence == 1 and bytes(far.image.data) == written


@pytest.mark.parametrize("reads", range(1, 12))
def test_the_space_of_a_point_that_is_taken_back_is_no_damage(far: Beside, reads: int) -> None:
    """While the point is read, the source sees that the applier of before has done it."""
    far.grant()
    far.run(far.applier.step())
    done = far.said()
    far.connect()
    again = far.new_applier(done)
    pread, left = far.journal.pread, itertools.count(-reads)

    def taken_back(buf: memoryview, offset: int) -> None:
        if next(left) == -1:
            superblocks, header = far.writer.superblocks, far.writer.headers[0]
            base = {"base": header.point, "base_digest": header.digest, "tail": header.end}
            far.run(superblocks.update(**base, applying=0, applier=0))
            far.run(far.writer.free())
        pread(buf, offset)

    far.run(far.writer.superblocks.update(applier=2))
    far.journal.pread = taken_back  # type: ignore[method-assign]
    before = bytes(far.image.data)
    far.run(again.step())
    assert bytes(far.image.data) == before
    assert far.said().phase is not Phase.WORKING


def test_the_source_waits_for_one_that_is_silent(far: Beside) -> None:
    far.grant()
    before = bytes(far.image.data)
    for _ in range(5):
        far.now_s += GONE_S
        assert (far.look().applying, far.look().applier) == (1, 1)
    assert far.watch.silent_s == 5 * GONE_S
    assert bytes(far.image.data) == before
    assert far.run(far.applier.step()) and far.look().base.sequence == 1


def test_the_source_applies_what_one_has_left_that_ended(far: Beside) -> None:
    far.grant()
    far.run(far.applier.end())
    block = far.look()
    assert (block.applying, block.applier) == (1, 0)
    assert far.look().base.sequence == 1
    assert bytes(far.image.data) == far.contents[1]


def test_one_that_was_killed_is_followed_by_another(far: Beside) -> None:
    far.grant()
    far.image.pwrite = _lost  # type: ignore[assignment]
    with pytest.raises(DeviceLost):
        far.run(far.applier.step())
    del far.image.pwrite
    assert far.said().phase is Phase.WORKING
    far.look()
    far.now_s += GONE_S
    far.applier = far.new_applier(far.said())
    assert far.look().applier == 1, "whether it lives is not known yet"
    far.now_s += BEAT_S
    far.run(far.applier.beat())
    assert (far.look().applier, far.look().applying) == (2, 1)
    assert far.run(far.applier.step()) and far.look().base.sequence == 1
    assert bytes(far.image.data) == far.contents[1]


def _lost(*_: object) -> None:
    raise DeviceLost("image: connection lost")


def test_of_two_the_first_one_ends(far: Beside) -> None:
    """The second one has seen nothing of the first for long."""
    far.grant()
    far.new_applier(far.said())
    with pytest.raises(JournalTaken, match="another `nbdmirror apply` is at work"):
        far.run(far.applier.step())
    said = far.said()
    far.run(far.applier.end())
    assert far.said() == said, "the block is the second one's"


def test_a_second_one_that_sees_the_first_is_refused(far: Beside) -> None:
    seen = far.said()
    far.now_s += BEAT_S
    far.run(far.applier.beat())
    with pytest.raises(JournalTaken, match="another `nbdmirror apply` is at work"):
        far.new_applier(seen)


def test_damage_is_found_before_the_image_is_changed(far: Beside) -> None:
    header = far.writer.headers[0]
    (at, _), *_ = far.writer.superblocks.current.spans(header.place + BLOCK_BYTES, BLOCK_BYTES)
    far.grant()
    far.journal.data[at] ^= 1
    before = bytes(far.image.data)
    with pytest.raises(DamagedData):
        far.run(far.applier.step())
    assert bytes(far.image.data) == before and far.said().phase is Phase.RESTING
    far.run(far.applier.end())
    far.look()
    far.writer.last_batch.forget()
    with pytest.raises(DamagedData):
        far.look()


def test_it_ends_when_a_point_is_recovered(far: Beside) -> None:
    far.grant()
    far.point((8 * BLOCK_BYTES, BLOCK_BYTES))
    far.recover()
    with pytest.raises(JournalTaken, match="point 2 was recovered from this journal"):
        far.run(far.applier.step())
    assert bytes(far.image.data) == far.contents[2]


def test_it_does_not_write_to_an_image_of_another_disk(far: Beside) -> None:
    far.grant()
    assert far.run(far.applier.step()) and far.look().base.sequence == 1
    far.run(far.applier.end())
    far.applier = far.new_applier()
    far.point((8 * BLOCK_BYTES, BLOCK_BYTES))
    far.grant()
    far.image.data[:] = bytes(len(far.image.data))
    with pytest.raises(JournalError, match="the image does not hold point 1"):
        far.run(far.applier.step())
    assert not any(far.image.data)


def test_it_waits_while_the_source_copies_in_place(far: Beside) -> None:
    far.grant()
    far.run(far.applier.step())
    far.look()
    far.seed()
    assert not far.run(far.applier.step())


def test_neighbours_are_written_as_one() -> None:
    far = FarSide()
    far.fill(0, len(far.disk))
    far.seed()
    far.point(*((number * BLOCK_BYTES, BLOCK_BYTES) for number in (3, 1, 2, 9)))
    written: list[tuple[int, int]] = []
    write = far.image.pwrite

    def noted(buf: bytes, offset: int, fua: bool = False) -> None:
        written.append((offset // BLOCK_BYTES, len(buf) // BLOCK_BYTES))
        write(buf, offset, fua)

    far.image.pwrite = noted  # type: ignore[assignment, method-assign]
    far.recover()
    assert sorted(written) == [(1, 3), (9, 1)]
    assert bytes(far.image.data) == far.contents[1]


class SlowImage:
    """Each change takes the time of a slow disk. `then` is called after each one."""

    def __init__(self, far: Beside, request_s: float) -> None:
        self.far, self.request_s = far, request_s
        self.changes = 0
        self.then: Callable[[], None] = lambda: None
        self._write, self._zero = far.image.pwrite, far.image.zero
        far.image.pwrite = self._pwrite  # type: ignore[assignment, method-assign]
        far.image.zero = self._zeroes  # type: ignore[method-assign]

    def _pwrite(self, buf: bytes, offset: int, fua: bool = False) -> None:
        self._ends(lambda: self._write(buf, offset, fua))

    def _zeroes(self, offset: int, length: int, **options: bool) -> None:
        self._ends(lambda: self._zero(offset, length, **options))

    def _ends(self, change: Callable[[], None]) -> None:
        self.far.now_s += self.request_s
        self.changes += 1
        change()
        self.then()


BLOCKS_MANY = 600


def with_many(kind: str) -> Beside:
    """A point is granted that the image takes in one list of many requests."""
    far = Beside(2 * BLOCKS_MANY * BLOCK_BYTES)
    far.grant()
    assert far.run(far.applier.step())
    far.look()
    ranges = [(2 * number * BLOCK_BYTES, BLOCK_BYTES) for number in range(BLOCKS_MANY)]
    if kind == "zeroes":
        far.disk[:] = bytes(len(far.disk))
        far.begin(len(far.disk))
        far.send(0, len(far.disk))
        far.commit()
    else:
        far.point(*ranges)
    assert far.look().applying == 2
    return far


@pytest.mark.parametrize("kind", ["data", "zeroes"])
def test_a_slow_image_does_not_silence_the_applier(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applier, "ZERO_BYTES", 2 * BLOCK_BYTES)
    far = with_many(kind)
    slow = SlowImage(far, 0.02)
    heard: list[float] = [far.now_s]
    serial = far.said().serial

    def note() -> None:
        nonlocal serial
        if far.said().serial != serial:
            serial = far.said().serial
            heard.append(far.now_s)

    slow.then = note
    assert far.run(far.applier.step())
    assert slow.changes == BLOCKS_MANY
    heard.append(far.now_s)
    assert max(later - one for one, later in itertools.pairwise(heard)) <= BEAT_S + LOOK_S
    assert bytes(far.image.data) == far.contents[2]


@pytest.mark.parametrize("kind", ["data", "zeroes"])
def test_what_is_withdrawn_amid_many_writes_is_left(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recovery has the journal: it waits until the applier rests, which it does soon."""
    monkeypatch.setattr(applier, "ZERO_BYTES", 2 * BLOCK_BYTES)
    far = with_many(kind)
    slow = SlowImage(far, LOOK_S / 5)

    def withdraw() -> None:
        if slow.changes == 100:
            far.run(far.writer.superblocks.update(applier=0))

    slow.then = withdraw
    assert not far.run(far.applier.step())
    assert 100 <= slow.changes <= 105
    assert far.said().phase is Phase.RESTING
