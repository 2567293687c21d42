"""FineBitmap and Tracker: which parts of dirty granules are copied. What threads do to each other
there is in tests/model."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.disk import fine
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.claim import Claim, Range, joined
from nbdmirror.disk.fine import COARSE_LOOKS, NOTES_MAX, FineBitmap
from nbdmirror.disk.ledger import Ledger
from nbdmirror.disk.tracker import Tracker

KIB = 1 << 10
GRANULE, UNIT = 64 * KIB, 512
SIZE = 16 * GRANULE + 1000

offsets = st.integers(0, SIZE - 1)
lengths = st.sampled_from((1, 511, 512, 4096, GRANULE - 1, GRANULE, 3 * GRANULE)) | st.integers(
    1, SIZE
)


NOBODY = Ledger()
"""No request is under way."""


def refine(bits: Tracker | FineBitmap) -> None:
    bits.refine()
    for _ in range(2):
        bits.look(NOBODY)


def a_tracker(unit: int = UNIT) -> Tracker:
    tracker = Tracker(SIZE, GRANULE, unit=unit)
    refine(tracker)
    return tracker


def claimed(tracker: Tracker) -> Claim:
    claim = tracker.claim(0, SIZE)
    assert claim is not None
    return claim


def parts(bitmap: FineBitmap) -> list[Range]:
    """All that is dirty, taken a granule at a time."""
    found: list[Range] = []
    while run := bitmap.next_run(0, GRANULE):
        found += bitmap.take(*run) or (run,)
    return found


def units(ranges: list[Range]) -> set[int]:
    return {unit for at, span in ranges for unit in range(at // UNIT, -(-(at + span) // UNIT))}


def test_a_small_write_is_a_small_part() -> None:
    tracker = a_tracker()
    tracker.dirty.mark(3 * GRANULE + 8 * KIB, 4 * KIB)
    claim = claimed(tracker)
    assert (claim.offset, claim.length) == (3 * GRANULE, GRANULE)
    assert claim.parts == ((3 * GRANULE + 8 * KIB, 4 * KIB),)
    assert tracker.dirty.is_empty


@given(writes=st.lists(st.tuples(offsets, lengths), max_size=30))
def test_what_was_written_is_taken_and_nothing_else(writes: list[Range]) -> None:
    """Rounded out to units, each once, apart from each other and within the disk."""
    bitmap = FineBitmap(DirtyBitmap(SIZE, GRANULE), UNIT)
    refine(bitmap)
    writes = [(at, min(span, SIZE - at)) for at, span in writes]
    for write in writes:
        bitmap.mark(*write)
    found = parts(bitmap)
    assert units(found) == units(writes)
    assert sum(span for _, span in found) == sum(
        min(UNIT, SIZE - unit * UNIT) for unit in units(writes)
    )
    assert bitmap.noted_bytes == sum(span for _, span in writes)


@given(writes=st.lists(st.tuples(offsets, lengths), max_size=20), room=st.integers(0, 3))
def test_too_much_is_coarse_and_never_missed(writes: list[Range], room: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine, "NOTES_MAX", room)
        patch.setattr(fine, "DETAILS_MAX", room)
        bitmap = FineBitmap(DirtyBitmap(SIZE, GRANULE), UNIT)
        refine(bitmap)
        writes = [(at, min(span, SIZE - at)) for at, span in writes]
        for write in writes:
            bitmap.mark(*write)
        assert units(parts(bitmap)) >= units(writes)
        assert bitmap.is_empty


def test_notes_are_bounded_until_somebody_looks() -> None:
    tracker = a_tracker()
    notes = tracker.dirty._notes
    assert notes is not None
    for _ in range(2 * NOTES_MAX):
        tracker.dirty.mark(0, 1)
    assert len(notes) == NOTES_MAX
    assert claimed(tracker).parts is None
    tracker.dirty.mark(GRANULE, 1)
    assert claimed(tracker).parts is None, "who writes so often is copied in whole granules"
    assert tracker.dirty.noted_bytes == 2 * NOTES_MAX + 1


def test_who_writes_often_is_copied_in_whole_granules_for_a_while() -> None:
    tracker = a_tracker()
    for _ in range(NOTES_MAX):
        tracker.dirty.mark(0, 1)
    tracker.look(NOBODY)
    for _ in range(COARSE_LOOKS):
        tracker.dirty.mark(2 * GRANULE, 1)
        assert tracker.dirty._notes is None, "nothing is noted meanwhile"
        tracker.look(NOBODY)
    while tracker.dirty._notes is None:
        tracker.look(NOBODY)
    tracker.look(NOBODY)
    tracker.dirty.mark(2 * GRANULE, 1)
    while (claim := claimed(tracker)).offset < 2 * GRANULE:
        pass
    assert claim.parts is None, "the bit of the writes that nobody noted"
    tracker.settle(claim, failed=False)
    tracker.dirty.mark(2 * GRANULE, 1)
    assert claimed(tracker).parts == ((2 * GRANULE, UNIT),)


def test_parts_wait_for_writes_that_saw_no_notes() -> None:
    """Their bits are still to come, and a note of another write would narrow them."""
    ledger, tracker = Ledger(), Tracker(SIZE, GRANULE, unit=UNIT)
    ledger.attach(tracker.dirty)
    old = ledger.enter()
    tracker.refine()
    for _ in range(3):
        tracker.look(ledger)
    new = ledger.enter()
    ledger.leave(new, 0, 100)
    ledger.leave(old, 8 * KIB, 100)
    assert claimed(tracker).parts is None
    tracker.look(ledger)
    ledger.leave(ledger.enter(), GRANULE, 100)
    assert claimed(tracker).parts == ((GRANULE, UNIT),)


def test_the_users_granularity_is_what_is_copied() -> None:
    tracker = Tracker(SIZE, GRANULE)
    refine(tracker)
    tracker.dirty.mark(1, 1)
    assert claimed(tracker).parts is None
    assert tracker.dirty.noted_bytes == 1


def test_a_part_is_no_smaller_than_a_block() -> None:
    tracker = a_tracker(4 * KIB)
    tracker.dirty.mark(5 * KIB, 100)
    tracker.dirty.mark(16 * GRANULE + 999, 1)
    assert claimed(tracker).parts == ((4 * KIB, 4 * KIB),)
    assert claimed(tracker).parts is None, "the disk's odd end is one part"


def test_what_was_dirty_before_it_was_refined_is_whole() -> None:
    tracker = Tracker(SIZE, GRANULE, unit=UNIT)
    tracker.dirty.mark_all()
    refine(tracker)
    tracker.dirty.mark(0, 4 * KIB)
    claim = claimed(tracker)
    assert claim.parts is None
    tracker.settle(claim, failed=False)
    tracker.dirty.mark(0, 4 * KIB)
    assert claimed(tracker).parts == ((0, 4 * KIB),)


def failed_copy(tracker: Tracker) -> None:
    tracker.settle(claimed(tracker), failed=True)


def failed_flush(tracker: Tracker) -> None:
    tracker.settle(claimed(tracker), failed=False)
    tracker.end_flush(tracker.begin_flush(), failed=True)


def lost_target(tracker: Tracker) -> None:
    tracker.settle(claimed(tracker), failed=False)
    tracker.target_came_back()


def failed_write(tracker: Tracker) -> None:
    tracker.settle(claimed(tracker), failed=False)
    tracker.end_write(tracker.begin_write(0, 100), failed=True)


def marked_all(tracker: Tracker) -> None:
    tracker.dirty.mark_all()


def restored(tracker: Tracker) -> None:
    tracker.dirty.merge_bytes(tracker.dirty.to_bytes())


@pytest.mark.parametrize(
    "happens",
    [failed_flush, lost_target, failed_write, marked_all, restored],
    ids=lambda happens: happens.__name__,
)
def test_what_is_dirty_for_another_reason_is_whole_beside_a_later_write(happens: object) -> None:
    """The target may have lost all of the granule, not only what a guest writes to it next."""
    tracker = a_tracker()
    tracker.dirty.mark(0, 4 * KIB)
    assert callable(happens)
    happens(tracker)
    tracker.dirty.mark(8 * KIB, 4 * KIB)
    claim = claimed(tracker)
    assert claim.parts is None or claim.parts[0][1] >= GRANULE


def test_a_copy_that_fails_leaves_its_parts_dirty_and_no_more() -> None:
    tracker = a_tracker()
    tracker.dirty.mark(0, 4 * KIB)
    failed_copy(tracker)
    tracker.dirty.mark(8 * KIB, 4 * KIB)
    assert claimed(tracker).parts == ((0, 4 * KIB), (8 * KIB, 4 * KIB))


def test_what_a_copy_gives_back_is_dirty_in_its_parts() -> None:
    tracker = a_tracker()
    for granule in (0, 1, 2):
        tracker.dirty.mark(granule * GRANULE, 4 * KIB)
    claim = claimed(tracker)
    tracker.shrink(claim, GRANULE)
    assert claim.parts == ((0, 4 * KIB),)
    assert claimed(tracker).parts == ((GRANULE, 4 * KIB), (2 * GRANULE, 4 * KIB))


def test_a_synchronous_write_of_a_part_leaves_the_other_parts_dirty() -> None:
    tracker = a_tracker()
    tracker.dirty.mark(0, 4 * KIB)
    tracker.dirty.mark(16 * KIB, 4 * KIB)
    tracker.end_write(tracker.begin_write(4 * KIB, 8 * KIB), failed=False)
    assert claimed(tracker).parts == ((0, 4 * KIB), (16 * KIB, 4 * KIB))


@given(
    spans=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=8),
    gap=st.integers(0, 60),
)
def test_parts_are_joined_over_small_gaps(spans: list[Range], gap: int) -> None:
    position, found = 0, []
    for distance, length in spans:
        found.append((position + distance, length))
        position += distance + length
    after = joined(tuple(found), gap)
    for (at, span), (later, _) in pairwise(after):
        assert later - (at + span) > gap
    assert all(any(a <= at and at + n <= a + m for a, m in after) for at, n in found)
    assert sum(n for _, n in after) - sum(n for _, n in found) == sum(
        distance for distance, _ in spans[1:] if distance <= gap
    )


def test_a_granule_that_becomes_whole_while_it_is_taken_stays_dirty() -> None:
    """No more of the details is removed than was seen."""
    bitmap = FineBitmap(DirtyBitmap(SIZE, GRANULE), UNIT)
    refine(bitmap)
    bitmap.mark(0, 4 * KIB)
    calls: list[bool] = []

    class Whole(DirtyBitmap):
        def is_dirty(self, offset: int, length: int) -> bool:
            answer = super().is_dirty(offset, length)
            calls.append(answer)
            if len(calls) == 2:  # the first one sorts the note
                bitmap._room = 0
                bitmap.mark(8 * KIB, 4 * KIB)
            return answer

    bitmap._whole = Whole(SIZE, GRANULE)
    assert bitmap.take(0, GRANULE) == ((0, 4 * KIB),)
    bitmap._room = NOTES_MAX
    bitmap.mark(16 * KIB, 4 * KIB)
    assert bitmap.take(0, GRANULE) is None


@given(st.lists(st.tuples(offsets, lengths), max_size=20), st.booleans())
def test_all_dirty_parts_are_told_and_stay(writes: list[Range], looks: bool) -> None:
    bits = FineBitmap(DirtyBitmap(SIZE, GRANULE), UNIT)
    refine(bits)
    for offset, length in writes:
        bits.mark(offset, min(length, SIZE - offset))
        if looks:
            bits.look(NOBODY)
    found = bits.parts(1 << 20)
    assert found is not None
    again = FineBitmap(DirtyBitmap(SIZE, GRANULE), UNIT)
    again.begin_with(found)
    assert again.parts(1 << 20) == found == bits.parts(len(found))
    assert all(offset + length <= SIZE for offset, length in found)
    assert bits.parts(len(found) - 1) is None
    for granule in range(0, SIZE, GRANULE):
        length = min(GRANULE, SIZE - granule)
        if bits.is_dirty(granule, 1):
            assert bits.take(granule, length) == again.take(granule, length)
    assert bits.is_empty and again.is_empty


def test_parts_are_not_known_while_all_is_coarse() -> None:
    bits = FineBitmap(DirtyBitmap(SIZE, GRANULE), UNIT)
    bits.mark(0, 512)
    assert bits.parts(99) is None
    whole = FineBitmap(DirtyBitmap(SIZE, GRANULE), GRANULE)
    whole.begin_with([(0, 512)])
    assert whole.take(0, GRANULE) is None
