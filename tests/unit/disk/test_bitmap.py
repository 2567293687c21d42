"""DirtyBitmap against its model: a set of granule numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.disk.bitmap import GRANULARITY_MAX, DirtyBitmap, check_granularity
from nbdmirror.errors import ConfigError

GRANULARITIES = (512, 1024, 4096)
SIZE_MAX = 40 * 512 + 300

sizes = st.sampled_from((0, 1, 511, 512, 513, 4096)) | st.integers(0, SIZE_MAX)
granularities = st.sampled_from(GRANULARITIES)
operations = st.lists(
    st.tuples(
        st.sampled_from(("mark", "mark", "clear", "mark_all", "clear_all")),
        st.integers(0, SIZE_MAX),
        st.integers(0, SIZE_MAX),
    ),
    max_size=12,
)


class Model:
    """The same by enumeration."""

    def __init__(self, size: int, granularity: int) -> None:
        self.size = size
        self.granularity = granularity
        self.count = -(-size // granularity)
        self.dirty: set[int] = set()

    def bounds(self, granule: int) -> tuple[int, int]:
        return granule * self.granularity, min((granule + 1) * self.granularity, self.size)

    def touched(self, offset: int, length: int) -> set[int]:
        """Granules that share a byte with the range."""
        return {
            granule
            for granule in range(self.count)
            if max(offset, self.bounds(granule)[0]) < min(offset + length, self.bounds(granule)[1])
        }

    def covered(self, offset: int, length: int) -> set[int]:
        """Granules all of whose bytes are in the range."""
        return {
            granule
            for granule in range(self.count)
            if offset <= self.bounds(granule)[0] and self.bounds(granule)[1] <= offset + length
        }

    def next_run(self, offset: int, length_max: int) -> tuple[int, int] | None:
        later = [granule for granule in sorted(self.dirty) if self.bounds(granule)[0] >= offset]
        if not later:
            return None
        end = later[0] + 1
        while end in self.dirty and end - later[0] < length_max // self.granularity:
            end += 1
        start = self.bounds(later[0])[0]
        return start, self.bounds(end - 1)[1] - start

    @property
    def dirty_bytes(self) -> int:
        return sum(end - start for start, end in map(self.bounds, self.dirty))


def apply(
    size: int, granularity: int, steps: list[tuple[str, int, int]]
) -> tuple[DirtyBitmap, Model]:
    """Both, after the same operations, cut at the disk's end."""
    bitmap, model = DirtyBitmap(size, granularity), Model(size, granularity)
    for name, offset, length in steps:
        offset = min(offset, size)
        length = min(length, size - offset)
        if name == "mark":
            bitmap.mark(offset, length)
            model.dirty |= model.touched(offset, length)
        elif name == "clear":
            bitmap.clear(offset, length)
            model.dirty -= model.covered(offset, length)
        elif name == "mark_all":
            bitmap.mark_all()
            model.dirty = set(range(model.count))
        else:
            bitmap.clear_all()
            model.dirty = set()
    return bitmap, model


def assert_same(bitmap: DirtyBitmap, model: Model) -> None:
    found = {
        granule for granule in range(model.count) if bitmap.is_dirty(granule * model.granularity, 1)
    }
    assert found == model.dirty
    assert bitmap.dirty_bytes == model.dirty_bytes
    assert bitmap.is_empty == (not model.dirty)


@given(sizes, granularities, operations)
def test_marks_and_clears(size: int, granularity: int, steps: list[tuple[str, int, int]]) -> None:
    assert_same(*apply(size, granularity, steps))


@given(sizes, granularities, operations, st.integers(0, SIZE_MAX), st.integers(0, SIZE_MAX))
def test_next_run(
    size: int, granularity: int, steps: list[tuple[str, int, int]], offset: int, length_max: int
) -> None:
    bitmap, model = apply(size, granularity, steps)
    offset = min(offset, size)
    assert bitmap.next_run(offset, length_max) == model.next_run(offset, length_max)


@given(sizes, granularities, operations, st.integers(0, SIZE_MAX), st.integers(0, SIZE_MAX))
def test_is_dirty(
    size: int, granularity: int, steps: list[tuple[str, int, int]], offset: int, length: int
) -> None:
    bitmap, model = apply(size, granularity, steps)
    offset = min(offset, size)
    length = min(length, size - offset)
    assert bitmap.is_dirty(offset, length) == bool(model.dirty & model.touched(offset, length))


@given(sizes, granularities, granularities, operations, operations)
def test_merge(
    size: int,
    granularity: int,
    other_granularity: int,
    steps: list[tuple[str, int, int]],
    other_steps: list[tuple[str, int, int]],
) -> None:
    bitmap, model = apply(size, granularity, steps)
    other, other_model = apply(size, other_granularity, other_steps)
    bitmap.merge(other)
    for granule in other_model.dirty:
        start, end = other_model.bounds(granule)
        model.dirty |= model.touched(start, end - start)
    assert_same(bitmap, model)
    assert_same(other, other_model)


@given(sizes, granularities, operations, st.integers(0, SIZE_MAX))
def test_runs_cover_all_dirt_once(
    size: int, granularity: int, steps: list[tuple[str, int, int]], length_max: int
) -> None:
    """How the copier goes around: nothing is left out, nothing comes twice, and it ends."""
    bitmap, model = apply(size, granularity, steps)
    offset = total = 0
    for _ in range(model.count + 1):
        run = bitmap.next_run(offset, length_max)
        if run is None:
            break
        assert run[0] >= offset
        assert run[1] > 0
        offset, total = run[0] + run[1], total + run[1]
    assert total == model.dirty_bytes


@given(sizes, granularities, operations)
def test_a_copy_is_another_bitmap(
    size: int, granularity: int, steps: list[tuple[str, int, int]]
) -> None:
    bitmap, model = apply(size, granularity, steps)
    copy = bitmap.copy()
    bitmap.mark_all()
    assert_same(copy, model)


def test_a_disk_of_no_bytes() -> None:
    bitmap = DirtyBitmap(0, 65536)
    bitmap.mark_all()
    bitmap.mark(0, 0)
    bitmap.clear(0, 0)
    assert bitmap.is_empty
    assert bitmap.dirty_bytes == 0
    assert bitmap.next_run(0, 1 << 20) is None


@pytest.mark.rule(26)
def test_the_odd_last_granule_is_whole_only_to_the_disks_end() -> None:
    bitmap = DirtyBitmap(1000, 512)
    bitmap.mark_all()
    bitmap.clear(512, 487)
    assert bitmap.next_run(0, 1 << 20) == (0, 1000)
    bitmap.clear(512, 488)
    assert bitmap.next_run(0, 1 << 20) == (0, 512)


def test_sixteen_tebibytes() -> None:
    """Nothing in here counts granules one by one."""
    size = 16 << 40
    bitmap = DirtyBitmap(size, 64 << 10)
    bitmap.mark(size - 1, 1)
    assert bitmap.next_run(0, 1 << 20) == (size - (64 << 10), 64 << 10)
    bitmap.mark_all()
    assert bitmap.dirty_bytes == size


@pytest.mark.parametrize("granularity", [0, 1, 256, 513, 1000, 3 << 20, 2 * GRANULARITY_MAX, -512])
def test_bad_granularities(granularity: int) -> None:
    with pytest.raises(ConfigError, match="granularity"):
        check_granularity(granularity)
