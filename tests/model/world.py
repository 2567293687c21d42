"""A world of one thread for the mirror's rules: the real Ledger, Tracker and Copier between a
source and a target in memory, made of the parts in parts.py, and the invariant that must hold after
each step."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from typing import Any, cast
from unittest.mock import patch

from model.fineparts import BOUNDS, StepFine
from model.invariants import check_durable_granules, check_parts
from model.parts import (
    AnnouncedGuests,
    Guest,
    Request,
    Script,
    StepCondition,
    StepDevices,
    StepEvent,
    StepLoop,
    StepQueue,
    WouldBlock,
    may_reconnect,
)

from nbdmirror.disk import fine, tracker
from nbdmirror.disk.claim import Claim
from nbdmirror.disk.ledger import Ledger
from nbdmirror.disk.tracker import Tracker
from nbdmirror.mirror import buffers, in_flight
from nbdmirror.mirror.copier import Copier

ZERO_UNIT_BYTES, ZERO_BYTES_MAX = 256, 1024
"""Instead of the copier's: one piece becomes several requests, and a claim several pieces."""

UNIT_BYTES = 128
"""Of the gap that is filled, and of most worlds' parts of granules."""

DRAIN_STEPS_MAX = 5000


class World:
    """The mirror and its guests, and the invariant. Mutants override the class attributes or the
    methods that do what the guest's path does (`enter` to `end_synchronous`)."""

    ledger_class: type[Ledger] = Ledger
    tracker_class: type[Tracker] = Tracker
    fine_class: type[StepFine] = StepFine
    copier_class: type[Copier] = Copier
    loses_target = False
    """True in mutants that only a target with late requests shows."""
    checks_overlap = True
    """False in mutants, so that the bytes themselves have to show what is wrong."""

    def __init__(
        self,
        content: bytes,
        *,
        granularity: int,
        unit: int,
        begins_fine: bool = False,
        buffer_bytes: int,
        request_bytes_max: int,
        stops_on_error: bool = False,
    ) -> None:
        self.source = bytearray(content)
        self.target = bytearray(b"\xee" * len(content))
        self.size = len(content)
        self.granularity = granularity
        self.unit, self.begins_fine = unit, begins_fine
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
            (slice(guest.offset, guest.offset + guest.length), guest.before)
            for guest in self.guests
            if guest.claim in self.tracker._writes
        ]
        self._frozen: bytes | None = None
        self._offset_before = 0
        self._guests_made = 0
        self._patches = ExitStack()
        for each in (
            patch.object(buffers, "ZERO_UNIT_BYTES", ZERO_UNIT_BYTES),
            patch.object(buffers, "_ZEROES", bytes(ZERO_UNIT_BYTES)),
            patch.object(in_flight, "ZERO_BYTES_MAX", ZERO_BYTES_MAX),
            patch.object(in_flight, "PROBE_BYTES", ZERO_UNIT_BYTES),
            patch.object(in_flight, "GAP_BYTES", UNIT_BYTES),
            patch.object(in_flight, "QUICK_GAP_BYTES", UNIT_BYTES),
            patch.object(tracker, "FineBitmap", self.fine_class),
            *(patch.object(fine, name, bound) for name, bound in BOUNDS.items()),
        ):
            self._patches.enter_context(cast("AbstractContextManager[object]", each))

        self.ledger = self.ledger_class()
        self.ledger.writing = self.announced = AnnouncedGuests()
        self.tracker = self.tracker_class(self.size, granularity, unit=unit)
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
        self._patches.close()

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
        if self.begins_fine:
            self.refine()
        self.is_tracking = True

    def refine(self) -> None:
        """Begin with details; but while writes are under way that began before, see `look`."""
        self.tracker.refine()
        for _ in range(2):
            self.look()

    def look(self) -> None:
        self.tracker.look(self.ledger)

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

    @property
    def unanswered(self) -> int:
        return len(self.devices.left)

    def give_up_target(self) -> None:
        """What ConnectionPool.give_up does to all that is in flight there."""
        self.copier.stop()
        self.devices.give_up([guest for guest in self.guests if guest.is_at_target])

    def reconnect(self) -> bool:
        if not may_reconnect(self.unanswered):
            return False
        self.devices.is_lost = False
        self.tracker.target_came_back()
        self.copier.start()
        return True

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
            guest.is_at_target = content is self.target and not failed
            for start, end in self._parts(guest):
                if failed:
                    break
                failed = yield
                if guest.is_at_target and (guest.is_given_up or self.devices.is_lost):
                    failed = True
                else:
                    self._land(content, guest, start, (start + end + 1) // 2 if failed else end)
        yield
        guest.is_at_target = False
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
                    guest.before = bytes(self.target[guest.offset :][: guest.length])
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
        assert self.copier.in_flight <= self.copier._slots
        assert not self.condition.is_held
        self._check_gate()
        if self.checks_overlap:
            self._check_overlap()
        if self.is_tracking and self.source != self.target:
            check_parts(self)
        if self.is_tracking and self.source != self.devices.durable:
            check_durable_granules(self)

    @property
    def dirty(self) -> StepFine:
        return cast(StepFine, self.tracker.dirty)

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
        if self.devices.is_lost:
            return
        self.copier.set_speed(0)
        self.copier.start()
        for _ in range(DRAIN_STEPS_MAX):
            requests = [request for request in self.devices.requests if request is not spared]
            if not requests:
                return
            self.devices.end(requests[0], "well")
            self.check()
        raise AssertionError("the copier copies the same for ever")

    def answer_what_is_left(self) -> None:
        while self.devices.left:
            self.devices.carry_out_late(0, 1.0)
            self.check()

    def drain(self) -> None:
        """From now on all goes well: everybody must get through, and the copies be identical."""
        self.devices.at_once.clear()
        self.stops_on_error = False
        if self.devices.is_lost:
            self.answer_what_is_left()
            assert self.reconnect(), "it is not used again"
        if self.is_held:
            self.release()
        if not self.is_attached:
            self.attach()
        if not self.is_tracking:
            self.mark_all()
        self.copier.set_speed(0)
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
            self.loop.turn(0.1)  # the copier may rest, for a bounded time
            self.check()
        self.answer_what_is_left()
        assert not self.guests, "a guest waits for ever"
        assert not self.devices.requests and self.tracker.in_sync
        assert self.tracker.remaining_bytes == 0
        assert self.source == self.target
        self.copier.flush(lambda error: None)
        for request in list(self.devices.requests):
            self.devices.end(request, "well")
        assert self.source == self.devices.durable
        assert self.tracker.may_differ().is_empty
