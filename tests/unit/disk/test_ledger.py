"""Ledger with real threads. The interleavings are in test_mirror_invariant.py.

No sleeps: whoever waits is woken, and WAIT_S is for a test that fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from model.parts import AnnouncedGuests
from unit.disk.ledgerthreads import GRANULE, SIZE, running, wait

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.ledger import Ledger


def test_a_request_marks_every_bitmap_when_it_ends() -> None:
    ledger, first, second = Ledger(), DirtyBitmap(SIZE, GRANULE), DirtyBitmap(SIZE, 4096)
    token = ledger.enter()
    ledger.attach(first)
    ledger.attach(second)
    assert first.is_empty
    ledger.leave(token, 600, 10)
    assert first.next_run(0, SIZE) == (512, 512)
    assert second.next_run(0, SIZE) == (0, 4096)


class Interrupts:
    """Something that is marked, during which other things happen."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._calls = [call]

    def mark(self, offset: int, length: int) -> None:
        while self._calls:
            self._calls.pop()()


def test_a_request_marks_what_is_attached_and_filled_while_it_marks() -> None:
    """A mirror of a named bitmap begins: it takes over marks that this request has yet to make."""
    ledger, named, mirror = Ledger(), DirtyBitmap(SIZE, GRANULE), DirtyBitmap(SIZE, GRANULE)

    def begin() -> None:
        ledger.attach(mirror)
        mirror.merge(named)

    ledger.attach(Interrupts(begin))
    ledger.attach(named)
    ledger.leave(ledger.enter(), 600, 10)
    assert named.next_run(0, SIZE) == mirror.next_run(0, SIZE) == (512, 512)
    assert not ledger.writes()


def test_a_request_marks_nothing_twice() -> None:
    """A mirror at rest wakes: its alarm is detached, what is marked is copied, and another mirror
    attaches its bitmap, while the request that has woken it is still in progress."""
    ledger, alarm, other = Ledger(), DirtyBitmap(SIZE, GRANULE), DirtyBitmap(SIZE, GRANULE)
    mirror = DirtyBitmap(SIZE, GRANULE)

    def copy_at_once() -> None:
        ledger.detach(alarm)
        ledger.attach(other)
        mirror.clear(512, 512)

    for bitmap in (mirror, alarm, Interrupts(copy_at_once)):
        ledger.attach(bitmap)
    ledger.leave(ledger.enter(), 600, 10)
    assert mirror.is_empty
    assert other.next_run(0, SIZE) == (512, 512)


def test_a_disk_that_has_lost_writes_marks_every_bitmap_everywhere() -> None:
    """Behind a closed gate as well."""
    ledger, bitmap = Ledger(), DirtyBitmap(SIZE, GRANULE)
    ledger.attach(bitmap)
    ledger.close_gate(lambda: None)
    ledger.changed(SIZE)
    assert bitmap.bytes_in(0, SIZE) == SIZE
    assert ledger.is_idle


def test_a_settled_bitmap_and_a_detached_one_are_not_marked() -> None:
    ledger = Ledger()
    bitmaps = [DirtyBitmap(SIZE, GRANULE) for _ in range(3)]
    for bitmap in bitmaps:
        ledger.attach(bitmap)
    ledger.detach(bitmaps[2])
    ledger.leave(ledger.enter(), 0, 1, bitmaps[0])
    assert [bitmap.is_empty for bitmap in bitmaps] == [True, False, True]


def test_reads_and_writes_under_way_are_told_by_token() -> None:
    ledger = Ledger()
    read, write = ledger.enter_read(), ledger.enter()
    reads, writes = ledger.reads(), ledger.writes()
    later = ledger.enter_read(), ledger.enter()
    ledger.leave_read(read)
    ledger.leave(write, 0, 0)
    assert not ledger.reads_left(reads)
    assert not ledger.writes_left(writes)
    assert ledger.reads() == {later[0]}
    assert ledger.writes() == {later[1]}


def test_new_requests_are_counted_once() -> None:
    ledger = Ledger()
    for _ in range(3):
        ledger.leave(ledger.enter(), 0, 1)
    ledger.leave_read(ledger.enter_read())
    assert [ledger.new_requests() for _ in range(2)] == [4, 0]
    ledger.leave(ledger.enter(), 0, 1)
    assert [ledger.new_requests() for _ in range(2)] == [1, 0]


@pytest.mark.guarantee("The pause is bounded")
def test_the_gate_lets_reads_through() -> None:
    ledger = Ledger()
    ledger.close_gate(lambda: None)
    ledger.leave_read(ledger.enter_read())
    assert ledger.is_idle


def test_the_gate_waits_for_those_inside_and_holds_the_others() -> None:
    ledger = Ledger()
    idle, is_in, may_leave, entered = (threading.Event() for _ in range(4))

    def inside() -> None:
        token = ledger.enter()
        is_in.set()
        wait(may_leave)
        ledger.leave(token, 0, 0)

    def outside() -> None:
        token = ledger.enter()
        entered.set()
        ledger.leave(token, 0, 0)

    with running(inside):
        wait(is_in)
        ledger.close_gate(idle.set)
        assert not ledger.is_idle
        assert not idle.is_set()
        may_leave.set()
        wait(idle)
    assert ledger.is_idle
    with running(outside):
        assert not entered.is_set()
        ledger.open_gate()
        wait(entered)


def test_a_gate_on_an_idle_disk_tells_at_once() -> None:
    ledger, told = Ledger(), []
    ledger.close_gate(lambda: told.append(True))
    assert told
    ledger.open_gate()
    ledger.open_gate()
    ledger.close_gate(lambda: None)
    with pytest.raises(AssertionError, match="closed already"):
        ledger.close_gate(lambda: None)


def test_nobody_is_lost_at_the_gate() -> None:
    """4 guests, 10,000 requests, a gate that closes and opens as fast as it can. Behind the closed
    gate, once idle, nobody is inside; and each guest gets through all of its requests."""
    ledger = Ledger()
    requests, guests = 2500, 4
    inside: set[int] = set()
    over = threading.Event()
    closings = 0

    def guest(number: int) -> None:
        for _ in range(requests):
            token = ledger.enter()
            inside.add(number)
            inside.discard(number)
            ledger.leave(token, 0, 0)

    def owner() -> None:
        nonlocal closings
        while not over.is_set():
            idle = threading.Event()
            ledger.close_gate(idle.set)
            wait(idle)
            seen = [frozenset(inside) for _ in range(20)]
            ledger.open_gate()
            assert not any(seen), "somebody is past a closed gate"
            closings += 1

    with running(owner):
        try:
            with running(*[lambda number=number: guest(number) for number in range(guests)]):
                pass
        finally:
            over.set()
    assert closings
    assert ledger.is_idle


def test_idle_stays_true_while_a_guest_comes_to_the_closed_gate() -> None:
    """`is_idle`: "once true behind a closed gate, it stays true". Disk.swap asserts it, and a guest
    that has announced itself, and not yet seen the gate, must not make that fail: the gate would
    then never be opened."""
    ledger = Ledger()
    answers: list[bool] = []
    announced = AnnouncedGuests()
    announced.on_add = lambda: answers.append(ledger.is_idle)
    ledger.writing = announced
    arrived = threading.Event()
    ledger.close_gate(lambda: arrived.set() if answers else None)
    assert ledger.is_idle

    with running(lambda: ledger.leave(ledger.enter(), 0, 0)):
        wait(arrived)
        ledger.open_gate()
    assert answers == [True]


@pytest.mark.guarantee("The pause is bounded")
def test_who_was_let_go_is_not_held_by_the_next_gate() -> None:
    """An attempt to end timed out, and the next one begins at once, as Quiesce does."""
    ledger = Ledger()
    at_gate, through = threading.Event(), threading.Event()

    def write() -> None:
        token = ledger.enter()
        through.set()
        ledger.leave(token, 0, 0)

    ledger.close_gate(lambda: None)
    assert ledger.gate is not None
    ledger.gate.on_idle = at_gate.set
    threading.Thread(target=write, daemon=True).start()
    assert at_gate.wait(10)
    ledger.open_gate()
    ledger.close_gate(lambda: None)
    assert through.wait(10), "held by a second gate as well: for two attempts, or for ever"
    ledger.open_gate()
