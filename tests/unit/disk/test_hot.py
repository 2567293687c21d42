"""HotGranules, beside a set of numbers that does the same."""

from __future__ import annotations

import mmap
import random

import pytest
from support.seeds import SEED, print_seed

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.hot import PAGES_MAX, REGIONS_MAX, HotGranules
from nbdmirror.disk.tracker import Tracker

GRANULE = 512
REGION = mmap.PAGESIZE * 8
"""Granules."""


def first_run(dirty: set[int], hot: set[int], first: int, most: int) -> tuple[int, int] | None:
    wanted = {one for one in dirty - hot if one >= first}
    if not wanted:
        return None
    start = min(wanted)
    length = 1
    while length < most and start + length in wanted:
        length += 1
    return start, length


@pytest.mark.parametrize("round_", range(20))
def test_it_does_what_a_set_does(round_: int) -> None:
    print_seed()
    noise = random.Random(SEED + round_)
    count = noise.choice((1, 7, REGION - 1, REGION, REGION + 1, 3 * REGION - 5))
    bitmap = DirtyBitmap(count * GRANULE - noise.choice((0, 100)), GRANULE)
    found = HotGranules(bitmap)
    dirty: set[int] = set()
    hot: set[int] = set()
    for _ in range(30):
        first = noise.choice((0, REGION, 2 * REGION - 3, noise.randrange(count))) % count
        length = min(noise.choice((1, 3, 200, REGION)), count - first)
        numbers = range(first, first + length)
        size = min(length * GRANULE, bitmap.size - first * GRANULE)
        match noise.choice(("mark", "mark", "clear", "look")):
            case "mark":
                dirty |= set(numbers)
                bitmap.mark(first * GRANULE, size)
            case "clear":
                dirty -= set(numbers)
                bitmap.clear(first * GRANULE, size)
            case "look":
                hot = hot - set(numbers) | (dirty & set(numbers))
                found.look(first * GRANULE, size)
        assert found.size == len(hot) * GRANULE
        assert found.bytes_in(first * GRANULE, size) == len(hot & set(numbers)) * GRANULE
        assert found.is_hot(first * GRANULE, size) == bool(hot & set(numbers))
        most = noise.choice((1, 5, REGION))
        run, expected = found.next_run(first * GRANULE, most * GRANULE), None
        if (wanted := first_run(dirty, hot, first, most)) is not None:
            start, end = wanted[0] * GRANULE, sum(wanted) * GRANULE
            expected = start, min(end, bitmap.size) - start
        assert run == expected


def test_a_copy_stays_as_it_is() -> None:
    bitmap = DirtyBitmap(8 * GRANULE, GRANULE)
    found = HotGranules(bitmap)
    bitmap.mark(0, 2 * GRANULE)
    found.look(0, 8 * GRANULE)
    kept = found.copy()
    bitmap.clear_all()
    found.look(0, 8 * GRANULE)
    assert (found.size, kept.size) == (0, 2 * GRANULE)
    assert kept.is_hot(GRANULE, 1) and not found.is_hot(GRANULE, 1)


def test_its_memory_has_a_bound() -> None:
    """Whatever is dirty: beyond the bound nothing more gets hot, and all is copied."""
    bitmap = DirtyBitmap((PAGES_MAX + 50) * REGION * GRANULE, GRANULE)
    found = HotGranules(bitmap)
    for region in range(PAGES_MAX + 50):
        bitmap.mark(region * REGION * GRANULE, 1)
        found.look(region * REGION * GRANULE, REGION * GRANULE)
    assert len(found._pages) == PAGES_MAX and found.size == PAGES_MAX * GRANULE
    assert found.next_run(0, GRANULE) == (PAGES_MAX * REGION * GRANULE, GRANULE)
    bitmap.clear_all()
    for region in range(PAGES_MAX):
        found.look(region * REGION * GRANULE, REGION * GRANULE)
    assert not found._pages


def test_a_look_has_a_bound() -> None:
    """A copier that was so quick has passed a hole."""
    bitmap = DirtyBitmap((REGIONS_MAX + 1) * REGION * GRANULE, GRANULE)
    found = HotGranules(bitmap)
    bitmap.mark(0, GRANULE)
    found.look(0, bitmap.size)
    assert found.size == 0
    found.look(0, bitmap.size - REGION * GRANULE)
    assert found.size == GRANULE


def test_what_is_left_out_stays_dirty() -> None:
    tracker = Tracker(8 * GRANULE, GRANULE)
    hot = HotGranules(tracker.dirty)
    tracker.dirty.mark(2 * GRANULE, GRANULE)
    hot.look(0, 8 * GRANULE)
    tracker.dirty.mark_all()
    before, behind = tracker.claim(0, 8 * GRANULE, hot), tracker.claim(0, 8 * GRANULE, hot)
    assert before is not None and behind is not None
    assert (before.offset, before.end) == (0, 2 * GRANULE)
    assert (behind.offset, behind.end) == (3 * GRANULE, 8 * GRANULE)
    assert tracker.claim(0, 8 * GRANULE, hot) is None
    assert tracker.dirty.next_run(0, 8 * GRANULE) == (2 * GRANULE, GRANULE)
    last = tracker.claim(0, 8 * GRANULE)
    assert last is not None and last.offset == 2 * GRANULE
