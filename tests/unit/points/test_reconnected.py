"""A journal whose connection was lost comes back: as it was, with what was in flight or without.
What is known of the journal makes reading it quick, and decides nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence

import pytest
from support.seeds import SEED, print_seed
from unit.points.pointparts import (
    JOURNAL_BYTES,
    FarSide,
    check_goes_on,
    reconnect,
    reconnected,
    with_points,
)

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.errors import DeviceLost
from nbdmirror.points.applier import apply
from nbdmirror.points.format import BLOCK_BYTES, RING_START, SLOTS, Header, JournalError, State
from nbdmirror.points.reader import AHEAD_MAX, READ_BYTES_MAX, Journal, read
from nbdmirror.points.requests import Devices, Program, Read, Side, run
from nbdmirror.points.superblocks import JournalTaken

# Reading it.


def rounds(program: Program[Journal], far: FarSide) -> tuple[Journal, int]:
    """What is found, and how many times something was waited for."""
    count, journal = 0, far.journal
    try:
        while True:
            for request in next(program):
                assert isinstance(request, Read)
                request.run(journal)
            count += 1
    except StopIteration as end:
        found: Journal = end.value
        return found, count


def test_known_batches_are_read_many_at_a_time() -> None:
    far = FarSide(journal_bytes=16 << 20)
    far.seed()
    for _ in range(600):
        far.point((0, BLOCK_BYTES))
    known = far.writer.headers
    alone, alone_rounds = rounds(read("journal", far.journal.size), far)
    found, found_rounds = rounds(read("journal", far.journal.size, known), far)
    assert found == alone and len(found.headers) == 600
    assert alone_rounds == 602, "the superblocks, a header, and what follows each header"
    assert found_rounds <= 2 + 600 // AHEAD_MAX + 1
    part, part_rounds = rounds(read("journal", far.journal.size, known[:590]), far)
    assert part == alone and part_rounds <= found_rounds + 10


@pytest.mark.slow
def test_an_index_that_is_larger_than_a_request() -> None:
    entries = READ_BYTES_MAX // 32 + 1
    far = FarSide(2 * entries * BLOCK_BYTES, RING_START + (512 << 20))
    far.seed()
    far.writer.begin(1, bytes_max=entries * BLOCK_BYTES)
    for number in range(entries):
        far.writer.put([(2 * number * BLOCK_BYTES, BLOCK_BYTES, None)], lambda error: None)
    far.commit()
    assert far.writer.headers[0].index_bytes > READ_BYTES_MAX
    for known in ([], far.writer.headers):
        journal = far.run(read("journal", far.journal.size, known))
        assert [header.entries for header in journal.headers] == [entries]


class Life:
    """A journal in the course of time. `known`: what was known of it at any time."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.far = FarSide()
        self.far.seed()
        self.known: list[list[Header]] = [[]]

    def step(self) -> None:
        far, chance = self.far, self.chance
        kind = chance.choice(("point", "point", "point", "apply", "seed", "take over", "give up"))
        ranges = [(chance.randrange(8) * 2 * BLOCK_BYTES, BLOCK_BYTES) for _ in range(2)]
        if far.writer.room().free_bytes < 20 * BLOCK_BYTES:
            kind = "apply"
        if kind == "point":
            far.point(*ranges[: chance.randrange(3)])
        elif kind == "apply" and far.writer.headers:
            far.apply(chance.choice(far.writer.headers).point.sequence)
        elif kind == "seed" and chance.random() < 0.2:
            far.seed()
        elif kind == "take over":
            far.connect()
        elif kind == "give up":  # leaves data in the ring
            far.begin(BLOCK_BYTES)
            far.send(*ranges[0])
            far.writer.give_up(lambda error: None)
        self.known.append(list(far.writer.headers))

    def damage(self, journal: bytearray) -> None:
        """Or none: a block is torn, overwritten, or what it was long ago."""
        chance = self.chance
        used = self.far.writer.superblocks.current.tail % (JOURNAL_BYTES - RING_START)
        for _ in range(chance.randrange(3)):
            near = RING_START + (used + chance.randrange(64) * BLOCK_BYTES) % (1 << 20)
            at = chance.choice((near, near, chance.choice(SLOTS)))
            length = chance.choice((1, 512, BLOCK_BYTES))
            journal[at : at + length] = chance.choice(
                (bytes(length), chance.randbytes(length), self.old[at : at + length])
            )

    old = bytes(JOURNAL_BYTES)


def found_in(sides: Devices, known: Sequence[Header]) -> Journal | str:
    """What is there, or why it is no journal."""
    try:
        return run(read("journal", JOURNAL_BYTES, known), sides)
    except JournalError as error:
        return str(error)


def test_a_batch_with_another_index_than_the_known_one() -> None:
    """At the same place, with the same data before it."""
    one = with_points(2)
    other = copy.deepcopy(one)
    one.point((0, BLOCK_BYTES))
    zeroes = [(n * BLOCK_BYTES, BLOCK_BYTES, None) for n in range(1, 16)] * 20
    other.begin(16 * BLOCK_BYTES)
    other.send(0, BLOCK_BYTES)
    other.writer.put(zeroes, lambda error: None)
    other.commit()
    for far, known in ((one, other), (other, one)):
        assert far.run(read("journal", JOURNAL_BYTES, known.writer.headers)) == far.read()
        assert len(far.read().headers) == 3
    sizes = {far.writer.headers[2].index_bytes for far in (one, other)}
    assert (
        len(sizes) == 2 and one.writer.headers[2].index_place == other.writer.headers[2].index_place
    )


@pytest.mark.parametrize("number", range(8))
def test_what_is_found_does_not_depend_on_what_is_known(number: int) -> None:
    """Whatever has become of the journal since, and whatever is damaged."""
    print_seed()
    life = Life(random.Random(f"{SEED}-{number}"))
    lengths = set()
    for step in range(60):
        life.step()
        journal = MemoryDevice(JOURNAL_BYTES, description="journal")
        journal.data[:] = life.far.journal.data
        life.damage(journal.data)
        if not step % 10:
            life.old = bytes(life.far.journal.data)
        sides = {Side.JOURNAL: journal}
        for known in (life.known[-1], life.chance.choice(life.known)):
            alone, found = (found_in(sides, some) for some in ([], known))
            assert found == alone
            if isinstance(alone, Journal):
                lengths.add((len(alone.headers), bool(alone.damage)))
    assert len(lengths) > 5, "too little to say anything"


# It comes back as it was.


def test_it_goes_on_after_what_was_committed() -> None:
    far = with_points(5)
    far.apply(2)
    for _ in range(3):
        reconnect(far)
        assert far.writer.newest.sequence == len(far.contents)
        check_goes_on(far)


def test_it_goes_on_without_a_point_and_without_a_batch() -> None:
    far = FarSide()
    reconnect(far)
    far.seed()
    reconnect(far)
    far.point((0, BLOCK_BYTES))
    far.apply(1)
    reconnect(far)
    assert not far.writer.headers and far.writer.newest.sequence == 1
    far.seed()
    reconnect(far)
    check_goes_on(far)


@pytest.mark.parametrize("is_there", [True, False])
def test_the_outcome_of_a_commit_becomes_known(is_there: bool) -> None:
    far = with_points()
    far.fill(0, BLOCK_BYTES)
    far.begin(BLOCK_BYTES)
    far.send(0, BLOCK_BYTES)
    journal = far.exports[Side.JOURNAL]
    write = journal.start_durable_write

    def lost(buf: memoryview, offset: int, done: Callable[..., None]) -> None:
        if is_there:
            write(buf, offset, lambda error: None)
        done(DeviceLost("the connection is lost"))

    journal.start_durable_write = lost  # type: ignore[method-assign]
    with pytest.raises(DeviceLost):
        far.commit()
    journal.start_durable_write = write  # type: ignore[method-assign]
    if is_there:
        far.contents[4] = bytes(far.disk)
    reconnect(far)
    assert far.writer.newest.sequence == (4 if is_there else 3)
    check_goes_on(far)


@pytest.mark.parametrize("until", range(1, 12))
def test_the_connection_is_lost_again_while_it_is_taken_over(until: int) -> None:
    """What was lost with it may have been carried out: it is no other server's."""
    far = with_points()
    program, done = reconnected(far), 0
    try:
        while done < until:
            for request in next(program):
                done += 1
                if done <= until:
                    request.run(far.sides[request.side])
        program.close()
    except StopIteration:
        pass
    reconnect(far)
    check_goes_on(far)


def test_it_is_lost_while_a_point_is_applied() -> None:
    for until in range(1, 30):
        far = with_points(5)
        writes = 0

        def dies(kind: str, device: MemoryDevice, limit: int = until) -> None:
            write = getattr(device, kind)

            def counted(*arguments: object, **options: object) -> None:
                nonlocal writes
                writes += 1
                if writes > limit:
                    raise DeviceLost("the connection is lost")
                write(*arguments, **options)

            setattr(device, kind, counted)

        originals = far.image, far.journal
        far.image, far.journal = copy.copy(originals[0]), copy.copy(originals[1])
        for device in (far.image, far.journal):
            for kind in ("pwrite", "flush", "trim"):
                dies(kind, device)
        try:
            far.apply(4)
            is_whole = True
        except DeviceLost:
            is_whole = False
        far.image, far.journal = originals
        reconnect(far)
        check_goes_on(far)
        if is_whole:
            return
    raise AssertionError("it never ends")


def test_an_image_that_is_between_two_points_becomes_the_later_one() -> None:
    """It may have parts of that one, so it can be no earlier one any more, whoever asks for it."""
    far = with_points(5)
    program = apply(far.writer, 4)
    requests = next(program)
    while not (requests and requests[0].side is Side.IMAGE):
        for request in requests:
            request.run(far.sides[request.side])
        requests = next(program)
    requests[0].run(far.sides[Side.IMAGE])
    program.close()
    reconnect(far)
    assert [point.sequence for point in far.read().points] == [4, 5]
    far.apply(1)
    assert far.read().superblock.base.sequence == 4
    assert far.image.data == far.contents[4]
    check_goes_on(far)


def test_it_is_lost_while_the_image_is_handed_over() -> None:
    """This process is not refused, as others are, and takes the image back."""
    far = with_points(3)
    promoted = {"state": State.PROMOTED, "since_ns": 1}
    far.run(apply(far.writer, 3, last=promoted))
    with pytest.raises(JournalTaken, match="point 3 was recovered from this journal"):
        copy.deepcopy(far).connect()
    reconnect(far)
    assert far.writer.superblocks.current.state is State.PROMOTED
    far.run(far.writer.superblocks.update(state=State.OK, since_ns=2))
    check_goes_on(far)


# It comes back, and is not what it was.
