"""SpillFile and SavedGranules: content that guests overwrite goes to memory, then to a file, and
comes back as it was."""

from __future__ import annotations

import errno
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from unit.disk.ledgerthreads import WAIT_S, running

import nbdmirror.disk.saved
from nbdmirror.disk.saved import ENTRY_BYTES, Saved, SavedFull, SavedGranules
from nbdmirror.state.spill import SpillFile

GRANULE, CONTENT_BYTES = 4096, 2560

NewSpill = Callable[[int, "Posted"], SpillFile]


@pytest.fixture
def spill_file(tmp_path: Path) -> Iterator[NewSpill]:
    """Makes a spill file of a size."""
    files: list[SpillFile] = []
    errors: list[OSError] = []

    def make(size: int, posted: Posted) -> SpillFile:
        files.append(SpillFile(tmp_path, size, posted.calls.put, errors.append))
        assert files[-1]._fd >= 0
        assert not os.listdir(tmp_path), "the file has no name"
        return files[-1]

    yield make
    for file in files:
        file.close()
        assert file._readers.wait(WAIT_S)
    assert errors == []


class Posted:
    """An event loop that is this test."""

    def __init__(self) -> None:
        self.calls: queue.Queue[Callable[[], None]] = queue.Queue()

    def turn(self) -> None:
        self.calls.get(timeout=WAIT_S)()


def put(saved: SavedGranules, granule: int, fill: bytes | None) -> None:
    offset = granule * GRANULE
    parts = ((offset + 512, 512), (offset + 2048, 1024))
    content = None if fill is None else bytearray(fill * CONTENT_BYTES)
    saved.put(Saved(offset, GRANULE, parts, content))


def take_all(saved: SavedGranules, posted: Posted) -> dict[int, bytes]:
    """By granule, what was saved: from memory, then from the file."""
    found: list[Saved] = []
    while entries := saved.take(1):
        found += entries
    while saved.may_read_spilled:
        counts = [len(found)]

        def then(some: list[Saved], error: BaseException | None) -> None:
            assert error is None
            found.extend(some)

        saved.read_spilled(then)
        while len(found) == counts[0]:
            posted.turn()
    assert saved.is_empty
    for entry in found:
        assert entry.parts == ((entry.offset + 512, 512), (entry.offset + 2048, 1024))
    return {
        entry.offset // GRANULE: b"-" if entry.content is None else bytes(entry.content[:1])
        for entry in found
    }


def test_content_comes_back_from_memory_and_from_the_file(spill_file: NewSpill) -> None:
    posted = Posted()
    saved = SavedGranules(ENTRY_BYTES + CONTENT_BYTES, spill_file(8000, posted))
    fills = (b"a", b"b", None, b"c", b"d")
    for granule, fill in enumerate(fills):
        put(saved, granule, fill)
    with pytest.raises(SavedFull) as caught:
        put(saved, 5, b"e")
    assert caught.value.errno == errno.ENOSPC
    assert not saved.is_empty
    found = take_all(saved, posted)
    assert found == {granule: fill or b"-" for granule, fill in enumerate(fills)}


def test_a_record_may_be_larger_than_a_read(
    spill_file: NewSpill, monkeypatch: pytest.MonkeyPatch
) -> None:
    posted = Posted()
    saved = SavedGranules(0, spill_file(1 << 20, posted))
    for granule in range(3):
        put(saved, granule, b"a")
    for length in (1, 30, CONTENT_BYTES, 1 << 20):
        monkeypatch.setattr(nbdmirror.disk.saved, "SPILL_READ_BYTES", length)
        saved._next = 0
        assert take_all(saved, posted) == {0: b"a", 1: b"a", 2: b"a"}


def test_memory_is_used_again() -> None:
    saved = SavedGranules(ENTRY_BYTES + CONTENT_BYTES)
    for granule in range(3):
        put(saved, granule, b"a")
        with pytest.raises(SavedFull):
            put(saved, granule, b"b")
        assert len(saved.take(1)) == 1


def test_several_ranges_are_taken_together() -> None:
    """About as much as is wanted, in the order in which they were saved; and their memory is free
    then."""
    saved = SavedGranules(3 * (ENTRY_BYTES + CONTENT_BYTES))
    for granule in range(3):
        put(saved, granule, b"a")
    taken = saved.take(2 * (ENTRY_BYTES + CONTENT_BYTES))
    assert [entry.offset for entry in taken] == [0, GRANULE]
    put(saved, 3, b"a")
    put(saved, 4, b"a")
    with pytest.raises(SavedFull):
        put(saved, 5, b"a")
    assert [entry.offset for entry in saved.take(1 << 20)] == [
        2 * GRANULE,
        3 * GRANULE,
        4 * GRANULE,
    ]
    assert saved.take(1 << 20) == []


def test_zeroes_take_memory_as_well() -> None:
    saved = SavedGranules(2 * ENTRY_BYTES)
    put(saved, 0, None)
    put(saved, 1, None)
    with pytest.raises(SavedFull):
        put(saved, 2, None)


def test_a_file_that_fails_is_reported_and_not_used_again(spill_file: NewSpill) -> None:
    """What was spilled before is read, and the record that failed is skipped."""
    posted = Posted()
    spill = spill_file(1 << 20, posted)
    saved = SavedGranules(0, spill)
    put(saved, 0, b"a")
    good = os.dup(spill._fd)
    os.dup2(full := os.open("/dev/full", os.O_RDWR), spill._fd)
    with pytest.raises(OSError, match="No space left"):
        put(saved, 1, b"b")
    os.dup2(good, spill._fd)
    os.close(good)
    os.close(full)
    with pytest.raises(SavedFull):
        put(saved, 2, b"c")
    assert take_all(saved, posted) == {0: b"a"}


def test_a_file_that_was_truncated_is_an_error(spill_file: NewSpill) -> None:
    posted = Posted()
    spill = spill_file(1 << 20, posted)
    saved = SavedGranules(0, spill)
    put(saved, 0, b"a")
    os.ftruncate(spill._fd, 100)
    errors: list[BaseException | None] = []
    saved.read_spilled(lambda _, error: errors.append(error))
    posted.turn()
    assert isinstance(errors[0], OSError)


def test_a_file_that_cannot_be_created_is_told(tmp_path: Path) -> None:
    posted, errors = Posted(), list[OSError]()
    spill = SpillFile(tmp_path / "gone", 1 << 20, posted.calls.put, errors.append)
    saved = SavedGranules(ENTRY_BYTES + CONTENT_BYTES, spill)
    put(saved, 0, b"a")
    with pytest.raises(FileNotFoundError):
        put(saved, 1, b"b")
    with pytest.raises(SavedFull):
        put(saved, 2, b"c")
    assert take_all(saved, posted) == {0: b"a"}
    spill.close()
    assert spill._readers.wait(WAIT_S)
    assert [error.errno for error in errors] == [errno.ENOENT]


def test_only_who_needs_the_file_waits_for_its_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither who makes it, nor who closes it: both are the event loop."""
    answers, create = threading.Event(), tempfile.TemporaryFile

    def hanging(**options: Any) -> Any:
        assert answers.wait(WAIT_S)
        return create(**options)

    monkeypatch.setattr(tempfile, "TemporaryFile", hanging)
    posted, errors = Posted(), list[OSError]()
    needed, unneeded = (
        SpillFile(tmp_path, 1 << 20, posted.calls.put, errors.append) for _ in range(2)
    )
    unneeded.close()
    saved = SavedGranules(ENTRY_BYTES + CONTENT_BYTES, needed)
    put(saved, 0, b"a")
    with running(lambda: put(saved, 1, b"b")):
        answers.set()
    assert take_all(saved, posted) == {0: b"a", 1: b"b"}
    needed.close()
    assert needed._readers.wait(WAIT_S) and unneeded._readers.wait(WAIT_S)
    assert errors == []


def test_guests_save_at_once(spill_file: NewSpill) -> None:
    posted = Posted()
    saved = SavedGranules(10 * (ENTRY_BYTES + CONTENT_BYTES), spill_file(1 << 20, posted))
    barrier = threading.Barrier(4)

    def guest(number: int) -> Callable[[], None]:
        def save() -> None:
            barrier.wait(WAIT_S)
            for granule in range(number, 80, 4):
                put(saved, granule, bytes([granule]))

        return save

    with running(*(guest(number) for number in range(4))):
        pass
    assert take_all(saved, posted) == {granule: bytes([granule]) for granule in range(80)}


def test_a_record_that_is_being_written_is_not_read_yet(spill_file: NewSpill) -> None:
    """Nor is one behind it."""
    posted = Posted()
    spill = spill_file(1 << 20, posted)
    saved = SavedGranules(0, spill)
    write = spill.write
    seen: list[bool] = []

    def slow(content: bytes, place: int) -> None:
        spill.write = write  # type: ignore[method-assign]
        put(saved, 1, b"b")
        seen.append(saved.may_read_spilled or saved.is_empty)
        write(content, place)

    spill.write = slow  # type: ignore[method-assign]
    put(saved, 0, b"a")
    assert seen == [False]
    assert take_all(saved, posted) == {0: b"a", 1: b"b"}
