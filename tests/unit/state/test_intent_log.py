"""The log of write intents: what a power cut leaves of it, and what is damage; and the threads that
write to it together."""

from __future__ import annotations

import random
import threading
from itertools import product

import pytest

from nbdmirror.state import intent_log as intentlog
from nbdmirror.state.intent_log import SECTOR_BYTES, SLOTS, IntentLog, region_bytes, slot_bytes
from nbdmirror.state.journal import (
    JOURNAL_BYTES,
    TAKEN_MAX,
    Journal,
    Regions,
    is_untouched,
    ranges_left,
)
from nbdmirror.state.recent import RECENT_BYTES, REQUESTS_MAX
from nbdmirror.state.sealed_files import StateError

MiB = 1 << 20
DISK, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2


def journal_in(memory: bytearray) -> Journal:
    return Journal(memoryview(memory), memoryview(bytearray(RECENT_BYTES)))


class Slots:
    """In memory; `write` notes what was synced."""

    def __init__(self, size: int) -> None:
        self.content = [bytes(slot_bytes(size))] * SLOTS
        self.synced: list[IntentLog] = []
        self.writes = 0
        self.error: OSError | None = None
        self.size = size

    def write(self, index: int, content: bytes, *, sync: bool) -> None:
        if self.error is not None:
            raise self.error
        self.writes += 1
        self.content[index] = content

    def read(self, index: int) -> bytes:
        return self.content[index]

    def close(self) -> None:
        pass


def log(size: int, sequence: int, *regions: int) -> IntentLog:
    marks = bytearray(intentlog.region_count(size))
    for region in regions:
        marks[region] = 1
    return IntentLog(DISK, size, sequence, 1.5, bytes(marks))


def slots_of(size: int, *logs: IntentLog) -> Slots:
    slots = Slots(size)
    for one in logs:
        slots.content[one.sequence % SLOTS] = one.to_bytes()
    return slots


@pytest.mark.parametrize("size", [0, 1, MiB, MiB + 1, 1 << 30, 10 << 40, 16 << 40])
def test_what_was_written_is_read(size: int) -> None:
    last = intentlog.region_count(size) - 1
    found = IntentLog.read(
        slots_of(size, log(size, 4), log(size, 5, last)), disk_id=DISK, size=size
    )
    assert found == log(size, 5, last)
    start = last * region_bytes(size)
    assert list(found.ranges()) == [(start, size - start)]
    assert len(found.to_bytes()) == slot_bytes(size)


def test_regions_are_of_bounded_number_and_size() -> None:
    assert region_bytes(1 << 30) == MiB and region_bytes(64 << 30) == 64 * MiB
    assert region_bytes(0) == region_bytes(MiB) == MiB
    assert slot_bytes(16 << 40) < 64 << 10


def test_a_write_that_was_cut_short_is_no_damage() -> None:
    """Of its sectors any may be old and any new; nobody has relied on it."""
    size = 1 << 40  # several sectors
    rng = random.Random(7)
    count = intentlog.region_count(size)
    older, old, new = (log(size, sequence, *rng.sample(range(count), 50)) for sequence in (4, 5, 6))
    sectors = slot_bytes(size) // SECTOR_BYTES
    assert sectors > 2
    for which in product((False, True), repeat=sectors):
        slots = slots_of(size, older, old)
        content = bytearray(older.to_bytes())
        for index, is_new in enumerate(which):
            at = slice(index * SECTOR_BYTES, (index + 1) * SECTOR_BYTES)
            if is_new:
                content[at] = new.to_bytes()[at]
        slots.content[new.sequence % SLOTS] = bytes(content)
        found = IntentLog.read(slots, disk_id=DISK, size=size)
        relied_on = new if all(which) else old
        assert all(f for f, o in zip(found.regions, relied_on.regions, strict=True) if o)
        assert found.sequence == (6 if any(which) else 5)


@pytest.mark.guarantee("What is damaged is not believed")
@pytest.mark.parametrize("index", [0, 1])
def test_any_byte_that_is_wrong_is_damage(index: int) -> None:
    size = 1 << 40
    for at in range(0, slot_bytes(size), 7):
        slots = slots_of(size, log(size, 4, 1), log(size, 5, 2))
        content = bytearray(slots.content[index])
        content[at] ^= 1 << at % 8
        slots.content[index] = bytes(content)
        with pytest.raises(StateError):
            IntentLog.read(slots, disk_id=DISK, size=size)


def test_what_is_missing_or_of_another_disk_is_refused() -> None:
    size = 1 << 30
    for broken, reason in (
        (Slots(size), "damaged"),
        (slots_of(size, log(size, 4)), "damaged"),
        (slots_of(2 * size, log(2 * size, 4), log(2 * size, 5)), "another disk|damaged"),
    ):
        with pytest.raises(StateError, match=reason):
            IntentLog.read(broken, disk_id=DISK, size=size)
    with pytest.raises(StateError, match="another disk"):
        IntentLog.read(slots_of(size, log(size, 4), log(size, 5)), disk_id=OTHER, size=size)


# The regions that guests touch.


def regions(slots: Slots, **options: object) -> Regions:
    errors: list[OSError] = []
    made = Regions(
        disk_id=DISK, size=slots.size, slots=slots, clock=lambda: 1.5, on_error=errors.append,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    made.start()
    return made


def on_disk(slots: Slots) -> set[int]:
    marks = IntentLog.read(slots, disk_id=DISK, size=slots.size).regions
    return {number for number, mark in enumerate(marks) if mark}


def test_a_region_is_on_disk_before_the_write_and_only_once() -> None:
    slots = Slots(64 * MiB)
    journal = journal_in(bytearray(JOURNAL_BYTES))
    journal.regions = regions(slots)
    before = slots.writes
    slot = journal.begin(5 * MiB, 4096)
    assert on_disk(slots) == {5} and slots.writes == before + 1
    journal.end(slot)
    for _ in range(100):
        journal.end(journal.begin(5 * MiB + 4096, 4096))
    assert slots.writes == before + 1
    journal.end(journal.begin(7 * MiB - 1, 2))
    assert on_disk(slots) == {5, 6, 7}


def test_a_region_leaves_after_two_cuts_without_a_write() -> None:
    slots = Slots(64 * MiB)
    log = regions(slots)
    log.touch(1, 1)
    log.cut()
    log.touch(2, 2)
    log.retire()
    assert on_disk(slots) == {1, 2}
    log.cut()
    log.retire()
    assert on_disk(slots) == {2}
    log.cut()
    log.retire()
    assert on_disk(slots) == set() and not log.may_retire


def test_a_region_that_comes_back_is_put_on_disk_again() -> None:
    slots = Slots(64 * MiB)
    log = regions(slots)
    log.touch(1, 1)
    for _ in range(2):
        log.cut()
        log.retire()
    assert on_disk(slots) == set()
    log.touch(1, 1)
    assert on_disk(slots) == {1}


def test_what_an_earlier_process_left_stays_until_it_is_saved() -> None:
    slots = Slots(64 * MiB)
    regions(slots).touch(3, 3)
    found = IntentLog.read(slots, disk_id=DISK, size=slots.size)
    again = regions(slots, log=found)
    again.touch(9, 9)
    assert on_disk(slots) == {3, 9}
    anywhere = regions(slots, is_anywhere=True)
    assert on_disk(slots) == set(range(64))
    anywhere.cut()
    anywhere.retire()
    assert on_disk(slots) == set()


def test_a_log_that_cannot_be_written_ends_no_write_and_is_written_later() -> None:
    slots = Slots(64 * MiB)
    errors: list[OSError] = []
    log = Regions(
        disk_id=DISK, size=slots.size, slots=slots, clock=lambda: 1.5, on_error=errors.append
    )
    log.start()
    slots.error = OSError(5, "as ordered")
    log.touch(1, 1)
    log.touch(2, 2)
    assert len(errors) == 1, "told once"
    slots.error = None
    log.cut()
    log.retire()
    assert on_disk(slots) == {1, 2}


def test_threads_that_touch_together() -> None:
    """Each returns with its region on disk, whoever has written it; and they share writes."""
    slots = Slots(1 << 30)
    log = regions(slots)
    missing: list[int] = []
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        start.wait()
        for _ in range(200):
            region = rng.randrange(1024)
            log.touch(region, region)
            if not log.touched[region]:
                missing.append(region)
            marks = bytearray(1024)
            for content in list(slots.content):
                marks[:] = [a | b for a, b in zip(marks, _marks(content), strict=True)]
            if not marks[region]:
                missing.append(region)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not missing


def _marks(content: bytes) -> bytes:
    slots = Slots(1 << 30)
    slots.content = [content, content]
    return IntentLog.read(slots, disk_id=DISK, size=1 << 30).regions


# The requests under way.


def test_the_journal_tells_what_is_under_way() -> None:
    memory = bytearray(JOURNAL_BYTES)
    journal = journal_in(memory)
    first = journal.begin(10, 20)
    second = journal.begin(1 << 60, 5)
    assert set(ranges_left(bytes(memory))) == {(10, 20), (1 << 60, 5)}
    before = journal.under_way()
    journal.end(first)
    assert not journal.has_drained(before)
    journal.end(second)
    third = journal.begin(7, 7)
    assert journal.has_drained(before), "the same slot is another request's now"
    journal.end(third)
    assert list(ranges_left(bytes(memory))) == []


def test_more_requests_than_slots_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdmirror.state.journal.REQUESTS_MAX", 2)
    journal = journal_in(bytearray(32))
    slots = [journal.begin(number, 1) for number in range(2)]
    through = threading.Event()

    def late() -> None:
        slots.append(journal.begin(9, 1))
        through.set()

    threading.Thread(target=late, daemon=True).start()
    assert not through.wait(0.05)
    journal.end(slots[0])
    assert through.wait(10)


def test_the_journal_tells_whether_there_was_a_change() -> None:
    """Since the last `forget_done`; in doubt there was one."""
    memory = bytearray(JOURNAL_BYTES)
    journal = journal_in(memory)
    assert is_untouched(bytes(memory))
    slots = [journal.begin(0, 1) for _ in range(3)]
    assert not is_untouched(bytes(memory))
    for slot in slots[1:]:
        journal.end(slot)
    journal.forget_done()
    assert not is_untouched(bytes(memory)), "one is under way"
    journal.end(slots[0])
    assert not is_untouched(bytes(memory)), "it ended since"
    journal.forget_done()
    assert is_untouched(bytes(memory))
    journal.end(journal.begin(0, 512))
    assert not is_untouched(bytes(memory))
    for slot in [journal.begin(0, 1) for _ in range(TAKEN_MAX)]:
        journal.end(slot)
    journal.forget_done()
    assert is_untouched(bytes(memory))


def test_a_busy_journal_loses_no_slot_and_no_range() -> None:
    """Guests' threads begin and end while what was done is forgotten."""
    memory = bytearray(JOURNAL_BYTES)
    journal = journal_in(memory)
    has_ended = threading.Event()

    def guest(number: int) -> None:
        for _ in range(2000):
            slot = journal.begin(number, number)
            assert journal._cells[2 * slot : 2 * slot + 2].tolist() == [number, number]
            journal.end(slot)

    def looker() -> None:
        while not has_ended.is_set():
            journal.forget_done()

    looking = threading.Thread(target=looker)
    guests = [threading.Thread(target=guest, args=(number,)) for number in (1, 2, 3)]
    for thread in (looking, *guests):
        thread.start()
    for thread in guests:
        thread.join()
    has_ended.set()
    looking.join()
    journal.forget_done()
    assert sorted(journal._free) == list(range(REQUESTS_MAX))
    assert not list(ranges_left(bytes(memory)))
