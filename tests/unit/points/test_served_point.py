"""A point that guests write to, before its image holds it: nothing that was answered is lost,
whatever ends at whatever moment."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from random import Random

import pytest
from model.pointexports import SECTOR
from support.seeds import SEED, print_seed
from support.waiting import WAIT_S_MAX
from unit.points.pointparts import SECOND_NS, FarSide
from unit.points.servedparts import DISK_BYTES, PIECE, Machine, far_side

from nbdmirror.errors import DeviceError
from nbdmirror.points import applier, served
from nbdmirror.points.format import JournalError, State, Superblock
from nbdmirror.points.reader import Part
from nbdmirror.points.regions import RegionMap, write_map
from nbdmirror.points.requests import Program
from nbdmirror.points.served import ServedPoint

ROUNDS = 120


def rounds(seed: int, count: int = ROUNDS) -> None:
    """Servers that are killed, lose power, or have flushes that fail; and then a recovery."""
    random = Random(seed)
    for _ in range(count):
        machine = Machine(random)
        for _ in range(random.randrange(1, 5)):
            trouble = random.choice(("dies_at", "fails_at", "forgets_at"))
            machine.serve(**{trouble: random.randrange(1, 60)})
            machine.look(power_cut=random.random() < 0.6)
        if random.random() < 0.5:
            machine.recover()
            machine.look(power_cut=True)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "SAVE_BYTES", 128 << 10)


@pytest.mark.slow
@pytest.mark.guarantee("A point is served at once")
def test_no_answered_write_is_lost() -> None:
    print_seed()
    rounds(SEED)


def _write_first(self: ServedPoint) -> None:
    """What was copied counts as durable, without a flush and a map."""
    self._left &= ~self._copied


def _map_first(self: ServedPoint) -> AbstractContextManager[None]:
    return nullcontext()


def _all_of(parts: list[Part], regions: RegionMap | None) -> list[Part]:
    return parts


def _no_flush(self: ServedPoint) -> None:
    """In place of `sync`."""


BROKEN: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "guests write before the map says so": lambda patch: patch.setattr(
        ServedPoint, "_save", _write_first
    ),
    "a flush that fails loses nothing": lambda patch: patch.setattr(
        ServedPoint, "_noting_failures", _map_first
    ),
    "a recovery puts all of the point": lambda patch: patch.setattr(applier, "_lacking", _all_of),
    "the map before the flush": lambda patch: patch.setattr(
        "unit.points.servedparts.FlakyDevice.sync", _no_flush
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_rule_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BROKEN[broken](monkeypatch)
    with pytest.raises(AssertionError):
        rounds(1, 20 * ROUNDS)


def start(far: FarSide, wanted: str | None = None) -> ServedPoint:
    point = ServedPoint(far.image, far.journal, wanted=wanted)
    point.start(now_ns=9 * SECOND_NS)
    return point


def content(point: ServedPoint) -> bytes:
    buf = bytearray(point.size)
    point.pread(memoryview(buf), 0)
    return bytes(buf)


def bring(point: ServedPoint) -> None:
    while not point.is_complete:
        point.bring_some()


def test_each_point_is_served_and_becomes_the_image() -> None:
    print_seed()
    for seed in range(SEED, SEED + 20):
        original = far_side(Random(seed))
        for one in original.read().points:
            far = far_side(Random(seed))
            point = start(far, str(one.sequence))
            expected = bytearray(far.contents[one.sequence])
            assert content(point) == expected
            at = 0
            while at < DISK_BYTES:
                for extent in point.extents(at, DISK_BYTES - at):
                    assert not extent.zero or not any(expected[at : at + extent.length])
                    at += extent.length
            point.pwrite(b"guest", 70_001)
            expected[70_001:70_006] = b"guest"
            bring(point)
            assert content(point) == expected == far.image.data
            block = far.read().superblock
            assert (block.state, block.applying) == (State.PROMOTED, 0)
            assert far.read().points == [one]
            assert far.recover().was_done


def test_the_source_is_refused_from_the_first_moment_on() -> None:
    far = far_side(Random(1))
    start(far)
    far.fill(0, 4096)
    far.begin(4096)
    far.send(0, 4096)
    with pytest.raises(JournalError, match=r"point \d of this journal is served since 1970"):
        far.commit()
    with pytest.raises(JournalError, match="the image is in use there"):
        far.connect()


def test_another_point_is_refused_while_one_is_served() -> None:
    far = far_side(Random(2))
    points = [point.sequence for point in far.read().points]
    start(far, str(points[-1]))
    journal, image = bytes(far.journal.data), bytes(far.image.data)
    with pytest.raises(JournalError, match=f"point {points[-1]} is served since .*: there is no"):
        start(far, str(points[0]))
    with pytest.raises(JournalError, match=f"point {points[-1]} is served since .*: there is no"):
        far.recover(str(points[0]))
    assert (journal, image) == (bytes(far.journal.data), bytes(far.image.data))


def test_a_second_server_ends_the_first_one() -> None:
    far = far_side(Random(3))
    one = start(far)
    two = start(far)
    with pytest.raises(DeviceError, match=r"is served since .*: the image is in use there"):
        bring(one)
    with pytest.raises(DeviceError, match=r"is served since .*: the image is in use there"):
        content(one)
    bring(two)
    assert bytes(far.image.data) == far.contents[max(far.contents)]


def test_a_source_that_makes_points_meanwhile_does_not_prevent_the_start() -> None:
    far = far_side(Random(4))
    point = ServedPoint(far.image, far.journal, wanted=None)
    far.point((0, 4096))
    point.start(now_ns=SECOND_NS)
    assert content(point) == far.contents[max(far.contents)]
    assert far.contents[max(far.contents)] == bytes(far.disk)


def test_guests_that_write_first_at_once_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each map has a serial number of its own, and is never older than what was answered."""
    print_seed()
    serials: list[int] = []

    def noted(block: Superblock, regions: RegionMap) -> Program[None]:
        serials.append(regions.serial)
        return write_map(block, regions)

    monkeypatch.setattr(served, "write_map", noted)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        write_at_once(serials)
    finally:
        sys.setswitchinterval(interval_s)


def write_at_once(serials: list[int]) -> None:
    for seed in range(SEED, SEED + 30):
        random = Random(seed)
        far = far_side(random)
        point = start(far)
        expected = bytearray(content(point))
        serials.clear()

        together = threading.Barrier(6)

        def write(
            number: int,
            point: ServedPoint = point,
            model: bytearray = expected,
            together: threading.Barrier = together,
        ) -> None:
            own = Random(number)
            together.wait(WAIT_S_MAX)
            for _ in range(12):
                at = own.randrange(DISK_BYTES // PIECE) * PIECE + number * SECTOR
                data = own.randbytes(SECTOR)  # no two guests write to the same sector
                point.pwrite(data, at)
                model[at : at + SECTOR] = data

        threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S_MAX)
            assert not thread.is_alive()
        assert serials == list(range(1, len(serials) + 1))
        assert content(point) == expected
        assert content(start(far)) == expected, "after a kill"


def test_a_map_that_is_written_meanwhile_is_seen() -> None:
    """Between the look at the point and its start the server before has answered a write."""
    far = far_side(Random(5))
    one = start(far)
    two = ServedPoint(far.image, far.journal, wanted=None)
    expected = bytearray(content(one))
    one.pwrite(b"x" * DISK_BYTES, 0, True)
    expected[:] = b"x" * DISK_BYTES
    two.start(now_ns=SECOND_NS)
    assert content(two) == expected
    bring(two)
    assert bytes(far.image.data) == expected


def test_damage_does_not_keep_the_rest_out_of_the_image() -> None:
    far = far_side(Random(6))
    point = start(far)
    expected = content(point)
    piece = next(
        piece
        for _, _, piece in point._found.index.pieces(0, DISK_BYTES)
        if piece is not None and not piece.is_zero
    )
    journal = far.read().superblock
    ((at, _),) = journal.spans(piece.place, 1)
    far.journal.data[at] ^= 1
    again = start(far)
    region = again._found.regions.region_bytes
    for _ in range(DISK_BYTES // region):
        with pytest.raises(DeviceError, match="is damaged"):
            again.bring_some()
    needing = {
        number
        for offset, length, one in again._found.index.pieces(0, DISK_BYTES)
        if one is not None and one.place == piece.place
        for number in range(offset // region, -(-(offset + length) // region))
    }
    assert set(again._left_in(0, DISK_BYTES // region)) == needing
    for number in set(range(DISK_BYTES // region)) - needing:
        part = slice(number * region, (number + 1) * region)
        assert far.image.data[part] == expected[part]
