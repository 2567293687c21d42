"""The last changes and a mirror's remainder, in memory that outlives the process: what is left of
them after a kill at any moment."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.state import journal as journals
from nbdmirror.state import recent
from nbdmirror.state.journal import JOURNAL_BYTES, Journal
from nbdmirror.state.recent import (
    ENTRY,
    PARTS_MAX,
    RECENT_BYTES,
    REMAINDER_BYTES,
    ShmRemainder,
    changes_since,
    parts_left,
    read_remainder,
)

ENTRIES, LATE = 32, 9


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> bytearray:
    """Of a ring of few entries, for four requests at once."""
    for module in (journals, recent):
        monkeypatch.setattr(module, "RECENT_MAX", ENTRIES)
        monkeypatch.setattr(module, "REQUESTS_MAX", 4)
    monkeypatch.setattr(recent, "LATE_MAX", LATE)
    monkeypatch.setattr(recent, "RECENT_BYTES", ENTRIES * ENTRY.size)
    return bytearray(ENTRIES * ENTRY.size)


def journal_with(memory: bytearray) -> Journal:
    return Journal(memoryview(bytearray(JOURNAL_BYTES)), memoryview(memory))


def change(journal: Journal, *offsets: int) -> None:
    for offset in offsets:
        journal.end(journal.begin(offset, 1))


def found(memory: bytes | bytearray, position: int) -> set[int] | None:
    changes = changes_since(bytes(memory), position)
    return None if changes is None else {offset for offset, _ in changes}


def test_what_came_before_the_position_is_not_told() -> None:
    memory = bytearray(RECENT_BYTES)
    journal = journal_with(memory)
    change(journal, 1, 2)
    position, in_progress = journal.position()
    assert in_progress == []
    change(journal, 3, 4)
    slot = journal.begin(5, 1)
    assert found(memory, position) == {3, 4, 5}
    position, in_progress = journal.position()
    assert found(memory, position) == set() and in_progress == [(5, 1)]
    journal.end(slot)
    assert journal.position()[1] == []


@pytest.mark.parametrize("before", range(0, 3 * ENTRIES, 7))
def test_of_too_many_changes_nothing_is_told(memory: bytearray, before: int) -> None:
    journal = journal_with(memory)
    change(journal, *range(before))
    position, _ = journal.position()
    known = 0
    for count in range(1, 3 * ENTRIES):
        change(journal, before + count)
        left = found(memory, position)
        assert left in (None, set(range(before + 1, before + count + 1)))
        known += left is not None
    assert known >= ENTRIES - LATE - 2


@pytest.mark.parametrize("held", range(4))
def test_an_entry_that_is_cut_short_hides_no_other_change(memory: bytearray, held: int) -> None:
    """The process is killed while an entry is filled: any of its bytes may be old or new."""
    journal = journal_with(memory)
    for slot in [journal.begin(1000 + number, 1) for number in range(held)]:
        journal.end(slot)
    for count in range(2 * ENTRIES):
        for back in range(ENTRIES):
            position = max(1, held + count - back)
            truth = {
                number - 1 - held for number in range(max(position, held + 1), held + count + 1)
            }
            old = bytes(memory)
            entry = journal._entries[0]
            new = ENTRY.pack(0xFFFFFFFFFFFF, 7, held + count + 1)
            for cut in range(0, ENTRY.size + 1, 8):
                torn = bytearray(old)
                torn[entry : entry + cut] = new[:cut]
                left = found(torn, position)
                assert left is None or truth <= left, f"{cut} bytes"
        change(journal, count)


def test_threads_lose_no_change(memory: bytearray) -> None:
    """Each change that begins after a position was taken is told, or nothing is."""
    journal = journal_with(memory)
    announced: list[int] = []
    begun: list[int] = []
    missing: list[set[int]] = []
    has_ended = threading.Event()

    def guest(number: int) -> None:
        for count in range(1500):
            announced.append(offset := number * 100_000 + count)
            slot = journal.begin(offset, 1)
            begun.append(offset)
            journal.end(slot)

    def looker() -> None:
        while not has_ended.is_set():
            position, _ = journal.position()
            before = len(announced)
            has_ended.wait(0.0001)
            later = set(announced[before:]) & set(begun)
            left = found(memory, position)
            if left is not None and not later <= left:
                missing.append(later - left)

    looking = threading.Thread(target=looker)
    guests = [threading.Thread(target=guest, args=(number,)) for number in range(3)]
    for thread in (looking, *guests):
        thread.start()
    for thread in guests:
        thread.join()
    has_ended.set()
    looking.join()
    assert not missing
    assert sorted(journal._entries) == [at * ENTRY.size for at in range(ENTRIES)]


class Steps(ShmRemainder):
    """Notes what the memory holds before each of its steps."""

    def __init__(self, memory: bytearray) -> None:
        super().__init__(memoryview(memory), lambda: (1, []), lambda: None)
        self.memory = memory
        self.left: list[bytes] = []

    def _fill(self, start: int, content: Sequence[int]) -> None:
        for at, cell in enumerate(content):
            self.left.append(bytes(self.memory))
            self._cells[start + at] = cell

    def _choose(self, half: int) -> None:
        self.left.append(bytes(self.memory))
        super()._choose(half)


def test_a_remainder_is_the_old_one_or_the_new_one() -> None:
    remainder = Steps(bytearray(REMAINDER_BYTES))
    before = None
    for number in range(1, 6):
        parts = [(number * 100 + part, number) for part in range(number)]
        remainder.left.clear()
        remainder.put(number, parts)
        assert len(remainder.left) == 3 + 2 * number
        assert all(read_remainder(content) == before for content in remainder.left)
        before = (number, parts)
        assert read_remainder(bytes(remainder.memory)) == before
    remainder.withdraw()
    assert read_remainder(bytes(remainder.memory)) is None


def test_too_many_parts_leave_no_remainder() -> None:
    memory = bytearray(REMAINDER_BYTES)
    remainder = ShmRemainder(memoryview(memory), lambda: (1, []), lambda: None)
    remainder.put(1, [(0, 1)] * PARTS_MAX)
    assert read_remainder(bytes(memory)) == (1, [(0, 1)] * PARTS_MAX)
    remainder.put(2, [(0, 1)] * (PARTS_MAX + 1))
    assert read_remainder(bytes(memory)) is None


def test_memory_that_is_not_there_tells_nothing() -> None:
    """As an older version has left it, or one with other bounds."""
    remainder = Steps(bytearray(REMAINDER_BYTES))
    remainder.put(1, [(0, 512)])
    memory, changes = bytes(remainder.memory), bytes(RECENT_BYTES)
    assert parts_left(memory, changes, [(512, 512)], 4096) == [(0, 512), (512, 512)]
    for some in ((b"", changes), (memory, b""), (memory[:-8], changes), (memory, changes[:-8])):
        assert parts_left(*some, [], 4096) is None
    assert parts_left(bytes(REMAINDER_BYTES), changes, [], 4096) is None


@given(
    st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 9000)), max_size=4),
    st.integers(0, 9000),
)
def test_parts_are_within_the_disk(ranges: list[tuple[int, int]], size: int) -> None:
    remainder = Steps(bytearray(REMAINDER_BYTES))
    remainder.put(1, ranges)
    left = parts_left(bytes(remainder.memory), bytes(RECENT_BYTES), ranges, size)
    assert left is not None
    assert all(length > 0 and offset + length <= size for offset, length in left)
