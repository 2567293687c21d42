"""The parts of a world of one thread for the mirror's rules (world.py): locks, an event loop,
devices and guests, where each step of a guest or of a request is taken by hand.

What would block raises WouldBlock instead, out of the real code; the guest that was in there calls
again later, in its old place in the queue. So no product code is repeated here, and there is no
thread, no clock and no chance: the same steps give the same bytes.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from nbdmirror.devices.base import Done, Extent, ExtentsDone, merge_extents
from nbdmirror.disk.claim import Claim
from nbdmirror.errors import DeviceError, DeviceLost
from nbdmirror.event_loop import Timer
from nbdmirror.server.reconnect import require_answers

EXTENT_UNIT_BYTES = 128
"""What the source's allocation is known in, at best."""

_TO_TARGET = ("write", "zero", "flush")

Script = Generator[None, bool, None]


class WouldBlock(Exception):
    """The call would have had to wait for another thread."""


class StepCondition:
    """In place of Tracker's lock. Also checks that it is a leaf: never taken twice."""

    def __init__(self) -> None:
        self.is_held = False
        self.notified = 0
        self.on_release: Callable[[], None] | None = None
        """Runs once, after the next release: what another thread does there."""

    def __enter__(self) -> None:
        assert not self.is_held, "the tracker's lock is taken twice: a deadlock"
        self.is_held = True

    def __exit__(self, *_: object) -> None:
        self.is_held = False
        call, self.on_release = self.on_release, None
        if call is not None:
            call()

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        assert self.is_held
        if not predicate():
            raise WouldBlock

    def notify_all(self) -> None:
        assert self.is_held
        self.notified += 1


class StepQueue(list[Claim]):
    """In place of Tracker's queue of waiting writes: who calls again gets its old place."""

    again: Claim | None = None
    newest: Claim

    def append(self, claim: Claim) -> None:
        self.newest = claim
        if self.again is None:
            super().append(claim)
        else:
            self[self.index(self.again)] = claim
            self.again = None


class StepEvent:
    """In place of the gate's event."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self) -> None:
        self.is_set = True

    def wait(self) -> None:
        if not self.is_set:
            raise WouldBlock


class AnnouncedGuests(set[int]):
    """In place of the ledger's set: `on_add` is what other threads do between the announcement of a
    guest and its look at the gate."""

    on_add: Callable[[], None] | None = None

    def add(self, token: int) -> None:
        super().add(token)
        call, self.on_add = self.on_add, None
        if call is not None:
            call()


class StepLoop:
    """What the copier needs of the event loop; the clock moves by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.timers: list[tuple[float, Timer]] = []

    def clock(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        self.timers.append((self.now_s + delay_s, timer))
        return timer

    def turn(self, elapsed_s: float = 0.0) -> None:
        """One iteration, `elapsed_s` after the last."""
        self.now_s += elapsed_s
        due = [timer for at_s, timer in self.timers if at_s <= self.now_s]
        self.timers = [(at_s, timer) for at_s, timer in self.timers if at_s > self.now_s]
        for timer in due:
            timer.fire()


@dataclass(slots=True, eq=False)
class Request:
    """What the copier has started: queued until somebody lets it go on.

    `move(length)` is called for the bytes from `moved` on, in one or more parts; between them the
    guests go on. `answer(error)` tells the copier.
    """

    kind: str
    offset: int
    length: int
    move: Callable[[int, int], None]
    answer: Callable[[BaseException | None], None]
    moved: int = 0
    before: bytes = b""
    """What the target had there."""

    def go_on(self, part: float) -> None:
        """Let this part of what is left take effect."""
        count = int((self.length - self.moved) * part)
        self.move(self.moved, count)
        self.moved += count


class StepDevices:
    """Source and target as the copier sees them. `at_once` has the outcomes of the requests that
    are to end before their start returns; the others are queued."""

    def __init__(self, source: bytearray, target: bytearray) -> None:
        self.source = source
        self.target = target
        self.durable = bytearray(target)
        """What the target holds after a crash: what was acknowledged before a flush was sent."""
        self._flush_numbers = itertools.count(1)
        self._durable_number = 0
        """Of the newest flush that was answered: an older one that is answered after it does not
        bring back what was there before."""
        self.size = len(source)
        self.requests: list[Request] = []
        self.at_once: list[str] = []
        self.coarseness_bytes = EXTENT_UNIT_BYTES
        """How coarse the answers about extents are. A unit with any data in it is data."""
        self.extents_max = 99
        """Answers may fall short, down to one extent."""
        self.torn: Callable[[], list[tuple[slice, bytes]]] = list
        """Where others are writing to the target, and what was there before."""
        self.is_lost = False
        """The target's connection was given up, and there is no other yet."""
        self.left: list[Request] = []
        """Changes that were in flight there: the server may carry them out at any time."""

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        def move(moved: int, count: int) -> None:
            start = offset + moved
            buf[moved : moved + count] = self.source[start : start + count]

        self._start(Request("read", offset, len(buf), move, done))

    def start_write(self, buf: memoryview, offset: int, done: Done) -> None:
        content = bytes(buf)

        def move(moved: int, count: int) -> None:
            assert content == buf, "a buffer was changed while a request used it"
            start = offset + moved
            self.target[start : start + count] = content[moved : moved + count]

        self._start(Request("write", offset, len(buf), move, done))

    def start_zero(self, offset: int, length: int, may_trim: bool, done: Done) -> None:
        def move(moved: int, count: int) -> None:
            start = offset + moved
            self.target[start : start + count] = bytes(count)

        self._start(Request("zero", offset, length, move, done))

    def start_flush(self, done: Done) -> None:
        number = next(self._flush_numbers)
        content = bytearray(self.target)
        changes = [r for r in self.requests if r.kind in ("write", "zero")]
        torn = [(slice(r.offset, r.offset + r.length), r.before) for r in changes]
        for part, before in (*torn, *self.torn()):
            content[part] = before

        def answer(error: BaseException | None) -> None:
            if error is None and number > self._durable_number:
                self._durable_number = number
                self.durable[:] = content
            done(error)

        self._start(Request("flush", 0, 0, lambda *_: None, answer))

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        found: list[Extent] = []

        def move(moved: int, count: int) -> None:
            if not found:
                found.extend(self._extents(offset, length))

        def answer(error: BaseException | None) -> None:
            done(None if error else found, error)

        self._start(Request("extents", offset, length, move, answer))

    def give_up(self, guests: list[Guest]) -> None:
        """What is in flight to the target fails at once, and has its effect later, or never.
        `guests` are those whose writes are there."""
        self.is_lost = True
        for guest in guests:
            guest.is_given_up = True
            self.left.append(self._write_of(guest))
        in_flight = [request for request in self.requests if request.kind in _TO_TARGET]
        self.left += [request for request in in_flight if request.kind != "flush"]
        for request in in_flight:
            self.requests.remove(request)
        for request in in_flight:
            request.answer(DeviceLost(f"{request.kind} was given up"))

    def _write_of(self, guest: Guest) -> Request:
        def move(moved: int, count: int) -> None:
            start = guest.offset + moved
            self.target[start : start + count] = guest.content[moved : moved + count]

        return Request("write", guest.offset, guest.length, move, lambda error: None)

    def carry_out_late(self, which: int, part: float) -> None:
        self.left.pop(which % len(self.left)).go_on(part)

    def end(self, request: Request, outcome: str) -> None:
        """`well`, or an error: `unchanged`, or `torn`, with a part done."""
        self.requests.remove(request)
        self._end(request, outcome)

    def _start(self, request: Request) -> None:
        assert 0 <= request.offset <= request.offset + request.length <= self.size
        request.before = bytes(self.target[request.offset : request.offset + request.length])
        outcome = self.at_once.pop(0) if self.at_once else "later"
        if self.is_lost and request.kind in _TO_TARGET:
            request.answer(DeviceLost("the target is lost"))
        elif outcome == "later":
            self.requests.append(request)
        else:
            self._end(request, outcome)

    def _end(self, request: Request, outcome: str) -> None:
        request.go_on({"well": 1.0, "torn": 0.5, "unchanged": 0.0}[outcome])
        error = None if outcome == "well" else OSError(errno.EIO, f"{request.kind} failed")
        request.answer(error)

    def _extents(self, offset: int, length: int) -> list[Extent]:
        found = []
        end = offset + length
        while offset < end:
            unit = offset // self.coarseness_bytes * self.coarseness_bytes
            stop = min(end, unit + self.coarseness_bytes)
            zero = not any(self.source[unit : unit + self.coarseness_bytes])
            found.append(Extent(stop - offset, zero=zero, hole=zero))
            offset = stop
        return merge_extents(found)[: self.extents_max]


@dataclass(slots=True, eq=False)
class Guest:
    """One changing request of a guest, on its own (pretended) thread."""

    number: int
    offset: int
    content: bytes
    """All zeroes for zero and trim: to the mirror they are writes."""
    cut: float
    """Where the write is torn in two."""
    is_synchronous: bool
    script: Script = field(init=False)
    token: int | None = None
    claim: Claim | None = None
    is_under_way: bool = False
    """In background mode, between `enter` and the end of `leave`."""
    is_at_target: bool = False
    """In write-blocking mode, when the source has been written."""
    before: bytes = b""
    """What the target had there when the granules became this one's."""
    is_given_up: bool = False
    """While it was at the target: that write fails."""

    @property
    def length(self) -> int:
        return len(self.content)

    def touches(self, offset: int, length: int) -> bool:
        return self.offset < offset + length and offset < self.offset + self.length


def may_reconnect(unanswered: int) -> bool:
    """What nbdmirror/server/reconnect.py says of a target with so many unanswered requests."""
    pool = SimpleNamespace(unanswered=unanswered)
    device: Any = SimpleNamespace(uri="nbd://target", pool=pool)
    try:
        require_answers(device)
    except DeviceError:
        return False
    return True
