"""A world of one thread for the mirror's rules: the real Ledger, Tracker and Copier between a
source and a target in memory, where each step of a guest or of a request is taken by hand.

What would block raises WouldBlock instead, out of the real code; the guest that was in there calls
again later, in its old place in the queue. So no product code is repeated here, and there is no
thread, no clock and no chance: the same steps give the same bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import nbdmirror.copier
from nbdmirror.copier import Copier
from nbdmirror.device import Done, Extent, ExtentsDone, merge_extents
from nbdmirror.ledger import Claim, Ledger, Tracker
from nbdmirror.loop import Timer

ZERO_UNIT_BYTES = 256
"""Instead of the copier's 64 KiB: one piece becomes several requests."""

EXTENT_UNIT_BYTES = 128
"""What the source's allocation is known in, at best."""

DRAIN_STEPS_MAX = 5000

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
        self.size = len(source)
        self.requests: list[Request] = []
        self.at_once: list[str] = []
        self.coarseness_bytes = EXTENT_UNIT_BYTES
        """How coarse the answers about extents are. A unit with any data in it is data."""
        self.extents_max = 99
        """Answers may fall short, down to one extent."""
        self.torn: Callable[[], list[slice]] = list
        """Where others are writing to the target."""

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
        content = bytearray(self.target)
        changes = [r for r in self.requests if r.kind in ("write", "zero")]
        for request in changes:
            torn = slice(request.offset, request.offset + request.length)
            content[torn] = self.durable[torn]
        for torn in self.torn():
            content[torn] = self.durable[torn]

        def answer(error: BaseException | None) -> None:
            if error is None:
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

    def end(self, request: Request, outcome: str) -> None:
        """`well`, or an error: `unchanged`, or `torn`, with a part done."""
        self.requests.remove(request)
        self._end(request, outcome)

    def _start(self, request: Request) -> None:
        assert 0 <= request.offset <= request.offset + request.length <= self.size
        outcome = self.at_once.pop(0) if self.at_once else "later"
        if outcome == "later":
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

    @property
    def length(self) -> int:
        return len(self.content)

    def touches(self, offset: int, length: int) -> bool:
        return self.offset < offset + length and offset < self.offset + self.length


class World:
    """The mirror and its guests, and the invariant. Mutants override the class attributes or the
    methods that do what the guest's path does (`enter` to `end_synchronous`)."""

    ledger_class: type[Ledger] = Ledger
    tracker_class: type[Tracker] = Tracker
    copier_class: type[Copier] = Copier
    checks_overlap = True
    """False in mutants, so that the bytes themselves have to show what is wrong."""

    def __init__(
        self,
        content: bytes,
        *,
        granularity: int,
        buffer_bytes: int,
        request_bytes_max: int,
        stops_on_error: bool = False,
    ) -> None:
        self.source = bytearray(content)
        self.target = bytearray(b"\xee" * len(content))
        self.size = len(content)
        self.granularity = granularity
        self.stops_on_error = stops_on_error
        self.loop = StepLoop()
        self.devices = StepDevices(self.source, self.target)
        self.guests: list[Guest] = []
        self.failures: list[str] = []
        self.is_attached = False
        self.is_tracking = False
        """Attached and all marked: from here on the invariant holds."""
        self.is_held = False
        """Somebody has closed the gate."""
        self.is_told_idle = False
        self.devices.torn = lambda: [
            slice(guest.offset, guest.offset + guest.length)
            for guest in self.guests
            if guest.claim in self.tracker._writes
        ]
        self._frozen: bytes | None = None
        self._offset_before = 0
        self._guests_made = 0
        self._patches = [
            patch.object(nbdmirror.copier, "ZERO_UNIT_BYTES", ZERO_UNIT_BYTES),
            patch.object(nbdmirror.copier, "_ZEROES", bytes(ZERO_UNIT_BYTES)),
        ]
        for each in self._patches:
            each.start()

        self.ledger = self.ledger_class()
        self.announced = AnnouncedGuests()
        self.ledger.writing = self.announced
        self.tracker = self.tracker_class(self.size, granularity)
        self.condition = StepCondition()
        self.queue = StepQueue()
        stand_ins: Any = self.tracker
        stand_ins._lock = stand_ins._changed = self.condition
        stand_ins._waiting = self.queue
        self.copier = self.copier_class(
            source=self.devices,
            target=self.devices,
            tracker=self.tracker,
            observer=self,
            clock=self.loop.clock,
            call_later=self.loop.call_later,
            buffer_bytes=buffer_bytes,
            request_bytes_max=request_bytes_max,
        )

    def close(self) -> None:
        for each in self._patches:
            each.stop()

    # The copier's observer, which does what the job does.

    def copy_failed(self, operation: str, error: BaseException) -> None:
        assert not self.condition.is_held, "somebody is told under the lock"
        self.failures.append(operation)
        if self.stops_on_error:
            self.copier.stop()

    def copy_settled(self) -> None:
        assert self.copier.in_flight == 0
        self.copier.pump()

    # The mirror's owner.

    def attach(self) -> None:
        self.is_attached = True
        self.ledger.attach(self.tracker.dirty)

    def mark_all(self) -> None:
        self.tracker.dirty.mark_all()
        self.is_tracking = True

    def hold(self) -> None:
        """Close the gate, as the job does at its end."""
        assert not self.is_held
        self.is_held = True
        self.is_told_idle = False
        self.ledger.close_gate(self._on_idle)
        gate: Any = self.ledger.gate
        gate.opened = StepEvent()

    def hold_meanwhile(self) -> None:
        """The same between two steps of somebody else, who does not see it being checked."""
        self.hold()
        self._check_gate()

    def release(self) -> None:
        assert self.is_held
        self.is_held = False
        self.ledger.open_gate()

    def _on_idle(self) -> None:
        assert not self.condition.is_held, "somebody is told under the lock"
        self.is_told_idle = True

    # Guests. A script yields where another thread may go on, and is told whether to fail there.

    def add_guest(self, offset: int, content: bytes, *, cut: float, is_synchronous: bool) -> None:
        """A guest asks. Rule 11: whether it writes synchronously is decided here, for good."""
        self._guests_made += 1
        guest = Guest(self._guests_made, offset, content, cut, is_synchronous and self.is_tracking)
        guest.script = self._synchronous(guest) if guest.is_synchronous else self._background(guest)
        next(guest.script)
        self.guests.append(guest)

    def step_guest(self, guest: Guest, *, fail: bool = False) -> None:
        try:
            guest.script.send(fail)
        except StopIteration:
            self.guests.remove(guest)

    def _background(self, guest: Guest) -> Script:
        """Disk.pwrite, zero, trim."""
        failed = False
        yield
        yield from self._enter(guest)
        guest.is_under_way = True
        for start, end in self._parts(guest):
            failed = yield
            self._land(self.source, guest, start, (start + end + 1) // 2 if failed else end)
            if failed:
                break
        yield
        self.leave(guest, failed=failed)
        guest.is_under_way = False

    def _synchronous(self, guest: Guest) -> Script:
        """The same in copy-mode write-blocking: first the source, then the same bytes to the target
        (rules 7, 10, 12). What failed is marked by then, so it leaves this mirror's bitmap
        alone."""
        failed = False
        yield
        yield from self._enter(guest)
        yield
        yield from self._begin_synchronous(guest)
        for content in (self.source, self.target):
            for start, end in self._parts(guest):
                if not failed:
                    failed = yield
                    self._land(content, guest, start, (start + end + 1) // 2 if failed else end)
        yield
        self.end_synchronous(guest, failed=failed)
        yield
        assert guest.token is not None
        self.ledger.leave(guest.token, guest.offset, guest.length, self.tracker.dirty)

    def _enter(self, guest: Guest) -> Script:
        while guest.token is None:
            try:
                guest.token = self.enter(guest)
            except WouldBlock:
                yield

    def _begin_synchronous(self, guest: Guest) -> Script:
        seen = -1
        while guest.claim is None:
            if seen != self.condition.notified:  # otherwise nobody has woken this thread
                try:
                    guest.claim = self.begin_synchronous(guest)
                    return
                except WouldBlock:
                    waiting = self.queue.newest
                    seen = self.condition.notified
            yield
            self.queue.again = waiting if seen != self.condition.notified else None

    def _parts(self, guest: Guest) -> list[tuple[int, int]]:
        middle = int(guest.length * guest.cut)
        return [(start, end) for start, end in ((0, middle), (middle, guest.length)) if start < end]

    def _land(self, content: bytearray, guest: Guest, start: int, end: int) -> None:
        content[guest.offset + start : guest.offset + end] = guest.content[start:end]

    def enter(self, guest: Guest) -> int:
        return self.ledger.enter()

    def leave(self, guest: Guest, *, failed: bool) -> None:
        assert guest.token is not None
        self.ledger.leave(guest.token, guest.offset, guest.length)

    def begin_synchronous(self, guest: Guest) -> Claim:
        return self.tracker.begin_write(guest.offset, guest.length)

    def end_synchronous(self, guest: Guest, *, failed: bool) -> None:
        assert guest.claim is not None
        self.tracker.end_write(guest.claim, failed=failed)

    # What must hold.

    def check(self) -> None:
        copied = self.copier.copied_bytes
        assert copied >= self._offset_before, "offset went back"
        self._offset_before = copied
        assert self.copier.in_flight <= self.copier._depth._slots
        assert not self.condition.is_held
        self._check_gate()
        if self.checks_overlap:
            self._check_overlap()
        if self.is_tracking and self.source != self.target:
            self._check_granules()
        if self.is_tracking and self.source != self.devices.durable:
            self._check_durable_granules()

    def _check_granules(self) -> None:
        """THE INVARIANT of nbdmirror/ledger.py."""
        owned = self.claims
        for offset in range(0, self.size, self.granularity):
            granule = slice(offset, min(offset + self.granularity, self.size))
            length = granule.stop - granule.start
            assert (
                self.source[granule] == self.target[granule]
                or self.tracker.dirty.is_dirty(offset, length)
                or any(c.offset <= offset and granule.stop <= c.end for c in owned)
                or any(g.is_under_way and g.touches(offset, length) for g in self.guests)
            ), f"lost: the granule at {offset} differs, is clean, and nobody is at it"

    def _check_durable_granules(self) -> None:
        """The same of what a crash of the target leaves: what may differ is told by the bitmaps
        alone, whatever copies are in flight."""
        may_differ = self.tracker.may_differ()
        for offset in range(0, self.size, self.granularity):
            granule = slice(offset, min(offset + self.granularity, self.size))
            length = granule.stop - granule.start
            assert (
                self.source[granule] == self.devices.durable[granule]
                or may_differ.is_dirty(offset, length)
                or any(g.token is not None and g.touches(offset, length) for g in self.guests)
            ), f"lost in a crash of the target: the granule at {offset}"

    def _check_overlap(self) -> None:
        claims = sorted(self.claims, key=lambda claim: claim.offset)
        for first, second in pairwise(claims):
            assert not first.overlaps(second), f"two own {second.offset}: {first}, {second}"
        assert self.tracker.in_flight_bytes == sum(claim.length for claim in claims)

    def _check_gate(self) -> None:
        """Once idle behind a closed gate, no guest touches the source until it is opened."""
        if self.ledger.gate is None:
            self._frozen = None
        elif self._frozen is not None:
            assert self.ledger.is_idle, "idle behind a closed gate, and not any more"
            assert self.source == self._frozen, "a guest has passed a closed gate"
        elif self.ledger.is_idle:
            assert self.is_told_idle, "idle, and whoever closed the gate is not told"
            self._frozen = bytes(self.source)
        if self._frozen is not None and self.is_tracking and self.tracker.in_sync:
            assert self.source == self.target, "in sync with no guest there, and yet not identical"

    @property
    def claims(self) -> list[Claim]:
        return self.tracker._copies + self.tracker._writes

    # The end.

    def copy_all(self, spared: Request | None = None) -> None:
        """Let the copier do all that it can do while the guests, and one request, stand still."""
        self.copier.pace.set_speed(0)
        self.copier.start()
        for _ in range(DRAIN_STEPS_MAX):
            requests = [request for request in self.devices.requests if request is not spared]
            if not requests:
                return
            self.devices.end(requests[0], "well")
            self.check()
        raise AssertionError("the copier copies the same for ever")

    def drain(self) -> None:
        """From now on all goes well: everybody must get through, and the copies be identical."""
        self.devices.at_once.clear()
        self.stops_on_error = False
        if self.is_held:
            self.release()
        if not self.is_attached:
            self.attach()
        if not self.is_tracking:
            self.mark_all()
        self.copier.pace.set_speed(0)
        self.copier.start()
        for _ in range(DRAIN_STEPS_MAX):
            if not self.guests and not self.devices.requests and self.tracker.in_sync:
                break
            for guest in list(self.guests):
                self.step_guest(guest)
                self.check()
            for request in list(self.devices.requests):
                self.devices.end(request, "well")
                self.check()
            self.copier.pump()
            self.loop.turn()
            self.check()
        assert not self.guests, "a guest waits for ever"
        assert not self.devices.requests
        assert self.tracker.in_sync
        assert self.copier.remaining_bytes == 0
        assert self.source == self.target
        self.copier.flush(lambda error: None)
        for request in list(self.devices.requests):
            self.devices.end(request, "well")
        assert self.source == self.devices.durable
        assert self.tracker.may_differ().is_empty
