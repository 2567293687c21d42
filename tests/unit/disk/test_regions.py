"""DirtyBitmap's regions: what is dirty is found and counted without walking all bits, whatever
other threads mark meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from bitarray import bitarray
from bitarray.util import zeros
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.disk.bitmap import _PAGE_BITS, DirtyBitmap

GRANULE = 512
REGION = _PAGE_BITS * GRANULE
SIZE = 3 * REGION + 5 * GRANULE + 100
GRANULES = -(-SIZE // GRANULE)

edges = st.sampled_from([n * _PAGE_BITS for n in range(4)] + [GRANULES])
places = st.builds(
    lambda edge, off: max(0, min(GRANULES - 1, edge + off)), edges, st.integers(-3, 3)
)
steps = st.lists(
    st.tuples(
        st.sampled_from(("mark", "mark", "clear", "mark_all", "clear_all", "count", "merge", "or")),
        places,
        places,
    ),
    max_size=12,
)


def dirty(bitmap: DirtyBitmap) -> bitarray:
    found, offset = zeros(GRANULES, "little"), 0
    while run := bitmap.next_run(offset, SIZE):
        offset = run[0] + run[1]
        found[run[0] // GRANULE : -(-offset // GRANULE)] = 1
    return found


@given(steps=steps)
def test_the_same_by_enumeration(steps: list[tuple[str, int, int]]) -> None:
    bitmap, model = DirtyBitmap(SIZE, GRANULE), zeros(GRANULES, "little")
    for name, first, last in steps:
        first, last = min(first, last), max(first, last)
        offset, length = first * GRANULE, (last + 1 - first) * GRANULE
        length = min(length, SIZE - offset)
        if name in ("mark", "merge", "or"):
            model[first : last + 1] = 1
            other = DirtyBitmap(SIZE, GRANULE)
            other.mark(offset, length)
            if name == "mark":
                bitmap.mark(offset, length)
            elif name == "merge":
                bitmap.merge(other)
            else:
                bitmap.merge_bytes(other.to_bytes())
        elif name == "clear":
            model[first : last + 1] = 0
            bitmap.clear(offset, length)
        elif name == "count":
            assert bitmap.dirty_granules == model.count()
        else:
            model.setall(name == "mark_all")
            getattr(bitmap, name)()
        assert dirty(bitmap) == model
    assert bitmap.dirty_granules == model.count()
    assert bitmap.is_empty == (not model.any())
    assert dirty(bitmap.copy()) == model


@given(one=st.lists(places, max_size=6), two=st.lists(places, max_size=6))
def test_two_together(one: list[int], two: list[int]) -> None:
    first, second = DirtyBitmap(SIZE, GRANULE), DirtyBitmap(SIZE, GRANULE)
    for bitmap, granules in ((first, one), (second, two)):
        for granule in granules:
            bitmap.mark(granule * GRANULE, 1)
    both = set(one) & set(two)
    short = GRANULE - 100 if GRANULES - 1 in both else 0
    assert first.common_bytes(second) == len(both) * GRANULE - short
    first.subtract(second)
    assert {n for n, bit in enumerate(dirty(first)) if bit} == set(one) - set(two)
    assert first.dirty_granules == len(set(one) - set(two))


class Steps:
    """In place of the bits that say which regions were touched: another thread goes on after a
    region was said to be touched no more, or before it is said to be."""

    def __init__(self, touched: bitarray) -> None:
        self.touched = touched
        self.before_touch: Callable[[], object] | None = None
        self.after_untouch: Callable[[], object] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.touched, name)

    def __setitem__(self, key: Any, value: int) -> None:
        if value and (call := self.before_touch):
            self.before_touch = None
            call()
        self.touched[key] = value
        if not value and (call := self.after_untouch):
            self.after_untouch = None
            call()


class TouchesFirst(DirtyBitmap):
    """A mutant: the region is said to be touched before the bit is set."""

    def mark(self, offset: int, length: int) -> None:
        self._touched[offset // REGION] = 1
        assert not self.dirty_granules, "somebody counts between the two steps"
        self._bits[offset // GRANULE] = 1


def counted_meanwhile(bitmap: DirtyBitmap) -> bool:
    """Whether a mark is seen, between whose two steps the bits are counted."""
    touched: Any = Steps(bitmap._touched)
    touched.before_touch = lambda: bitmap.dirty_granules
    bitmap._touched = touched
    bitmap.mark(REGION, 1)
    return not bitmap.is_empty and bitmap.next_run(0, SIZE) == (REGION, GRANULE)


def test_a_mark_is_counted_if_somebody_counts_between_its_steps() -> None:
    assert counted_meanwhile(DirtyBitmap(SIZE, GRANULE))
    assert not counted_meanwhile(TouchesFirst(SIZE, GRANULE))


def test_a_mark_is_counted_that_comes_while_its_region_is_counted() -> None:
    bitmap = DirtyBitmap(SIZE, GRANULE)
    bitmap.mark(0, 1)
    touched: Any = Steps(bitmap._touched)
    touched.after_untouch = lambda: bitmap.mark(GRANULE, 1)
    bitmap._touched = touched
    assert bitmap.dirty_granules == 2
    assert bitmap.dirty_granules == 2
    bitmap.clear(0, SIZE)
    touched.after_untouch = lambda: bitmap.mark(2 * GRANULE, 1)
    assert not bitmap.is_empty
    assert bitmap.next_run(0, SIZE) == (2 * GRANULE, GRANULE)


def test_a_region_that_is_being_counted_is_not_passed_over() -> None:
    """By another thread that looks for what is dirty."""
    bitmap = DirtyBitmap(SIZE, GRANULE)
    bitmap.mark(REGION, 1)
    found: list[object] = []
    touched: Any = Steps(bitmap._touched)
    touched.after_untouch = lambda: found.append(bitmap.next_run(0, SIZE))
    bitmap._touched = touched
    assert bitmap.dirty_granules == 1
    assert found == [(REGION, GRANULE)]


@pytest.mark.parametrize("granules", [0, 1, 3])
def test_an_idle_disk_of_16_tib_is_not_walked(granules: int) -> None:
    """Counted in regions that are looked at, not in seconds."""
    bitmap = DirtyBitmap(16 << 40, 64 << 10)
    looked: list[int] = []

    class Bits:
        def __getattr__(self, name: str) -> Any:
            return getattr(bits, name)

        def __setitem__(self, key: Any, value: int) -> None:
            bits[key] = value

        def count(self, bit: int, start: int, stop: int) -> int:
            looked.append(stop - start)
            return bits.count(bit, start, stop)

        def find(self, bit: int, start: int, stop: int) -> int:
            looked.append(stop - start)
            return bits.find(bit, start, stop)

    bits, bitmap_any = bitmap._bits, bitmap
    bitmap_any._bits = Bits()  # type: ignore[assignment]
    for number in range(granules):
        bitmap.mark(number * (5 << 40), 1)
    assert bitmap.dirty_granules == granules
    assert (bitmap.next_run(0, 1) is None) == bitmap.is_empty == (granules == 0)
    assert sum(looked) <= (2 * granules + 1) * _PAGE_BITS
