"""InFlightWindow: how much of a copier's work may be in flight now. On the event loop's thread."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

QUICK_BYTES = 4 << 20
"""In flight to targets that answer quickly, of all mirrors together: 4 MiB stay in the processor's
cache on their way to a local server, 16 do not, and copies take a tenth longer; with four mirrors
of 4 MiB each, half as long again."""

PROBES = 16
PROBE_BYTES = 64 << 10
"""So many requests are small, or fewer, until one is answered quickly: the answer tells how far the
target is then, not how much it takes a second, nor what fresh memory costs."""

OPENING_BYTES = 4 << 20
"""Of one write, the first large one to a target that is quick. A server with glibc's malloc, which
qemu-nbd and QEMU are, gets a buffer that is larger than all before it from the kernel and gives it
back after the request: 256 pages for each MiB, cleared and mapped anew, two thirds of what a copy
costs such a target. Once it has freed a larger one it keeps what is smaller, and up to twice as
much of it. (mallopt(3), M_MMAP_THRESHOLD; docs/measurements/2026-11-28.md.)"""

QUICK_WRITE_S = 0.002
"""A target that has answered within this is quick: 4 MiB each 2 ms are more than such a link
carries. Times the number of mirrors that copy just then, since they wait for each other. To a
slower one as much is in flight as fits into buf-size."""

ANSWER_S = 0.5
"""So much longer an answer may take, behind others and because of its length; then less is asked
for. So a storage that is slow answers all that it was asked for within moments: its
progress shows, a pause comes about, and nobody takes it for one that hangs."""

CLAIM_BYTES_MAX = 32 << 30
"""Longest claim where nothing is known of the source: a hole of this length is one claim, if the
target zeroes as quickly as that. Long enough that the bitmap can give back whole pages."""

ZERO_BYTES_MAX = CLAIM_BYTES_MAX
"""Largest zero request. To a target whose lengths have 32 bits it goes in pieces."""

STRIDE_GROWTH = 8

ROOM_BYTES_MAX = 1 << 30
"""The largest `buf-size`: room for that is room enough."""

GROWTH = 3
"""With 1 a copy over a link of 20 ms takes two round trips more to get going."""

COPYING_PROCESSORS = 2
"""What copies with more than one large request in flight keep busy: one reads and sends, one takes
it at the target. Where there are no more than these, guests would wait for one of them."""

YIELDING_BYTES_PER_S = 1e9
"""What is in flight then carries so much, if the target answers as quickly as it did once: one
large request to a local target, one or two small ones, more over a network."""

YIELDING_REQUEST_BYTES = 512 << 10
"""Of such requests: the kernel copies each in one go, for which a guest's request waits. Smaller
ones gain nothing for guests, and the copy is slower; with 1 MiB both are slower, one at a time."""

CONVERGING = 0.6
"""After a round of more than this part of what the one before had, the next does not yield: with a
guest that writes faster than that, no round would be the last."""

BACKLOG_BYTES = 64 << 20
"""The same for a mirror that is only kept in sync, four rounds a second."""

GAP_BYTES, QUICK_GAP_BYTES = 1 << 10, 16 << 10
"""So much between two dirty places is sent with them, for one request less. To a target that is
quick a request costs as much processor time as 64 KiB and more; a quarter of that keeps what is
sent within a fifth of what was changed. Over a link what counts are the bytes, 100 of a request's
own with its answer, and that fewer requests wait."""

LOOK_S = 0.1
WORKING_PER_S = range(100, 10_000)
"""So many requests a second are of guests at work. Fewer are a journal's write now and then; more
are of guests that keep a processor busy by themselves."""


class Delay:
    """How much longer an answer took than it must have, whatever was asked for: what is far away
    takes its time, and asking for less would not help."""

    def __init__(self) -> None:
        self._least_s = math.inf

    def of(self, took_s: float, *, is_least: bool) -> float:
        """`is_least`: less cannot be asked for, so that this is what an answer takes now."""
        self._least_s = took_s if is_least else min(self._least_s, took_s)
        return took_s - self._least_s


class Stride:
    """How long the next request of a kind may be: longer while answers come quickly, shorter once
    one was late. What storages zero in a second differs by six orders of magnitude, between one
    that unmaps and one that writes zeroes."""

    def __init__(self, first: int, most: int) -> None:
        self.length = self._first = first
        self._most = most
        self._delay = Delay()

    @property
    def is_longest(self) -> bool:
        return self.length == self._most

    def answered(self, length: int, took_s: float) -> None:
        least = min(self._first, PROBE_BYTES)
        late_s = self._delay.of(took_s, is_least=length <= least)
        if late_s > ANSWER_S:
            self.length = max(least, min(self.length, _in_time(length, late_s)))
        elif length >= self.length and late_s * STRIDE_GROWTH <= ANSWER_S:
            self.length = min(self._most, self.length * STRIDE_GROWTH)

    def start_over(self) -> None:
        """Who answers next may be slower."""
        self.length = min(self.length, self._first)


class Holes:
    """How much of a hole is one claim, and how much of a claim is zeroed at once."""

    def __init__(self, request_bytes: int) -> None:
        """`request_bytes`: what both begin with."""
        self._request_bytes = request_bytes
        self._asked = Stride(request_bytes, CLAIM_BYTES_MAX)
        self.zeroed = Stride(request_bytes, ZERO_BYTES_MAX)
        self.is_inside = False
        """The last answer about extents was a hole."""

    @property
    def claim_bytes(self) -> int:
        """Of the next claim: to a target that does not zero quickly no more than one request."""
        is_quick = self.zeroed.is_longest
        return self._asked.length if is_quick else min(self._asked.length, self.zeroed.length)

    def found(self, length: int, took_s: float, *, is_hole: bool) -> None:
        """An answer about the extents of so many bytes."""
        self.is_inside = is_hole
        if is_hole:
            self._asked.answered(max(length, self._request_bytes), took_s)
        else:
            self._asked.start_over()


class CopierLoad:
    """What the copiers of one event loop share with each other, and with the guests.

    `new_requests`: how many requests of guests have begun since it was last called.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        new_requests: Callable[[], int],
        processors: int | None = None,
    ) -> None:
        """`processors`: None for what this process may run on."""
        self.count = 0
        """How many copiers have claims in flight."""
        self._clock = clock
        self._new_requests = new_requests
        self._processors = processors or len(os.sched_getaffinity(0))
        self._looked_s = clock()
        self._guests_work = False

    @property
    def guests_need_room(self) -> bool:
        """Guests are at work, and a copy at full speed would leave them no processor."""
        if self._processors > COPYING_PROCESSORS:
            return False
        now_s = self._clock()
        passed_s = now_s - self._looked_s
        if passed_s >= LOOK_S:
            self._looked_s = now_s
            self._guests_work = int(self._new_requests() / passed_s) in WORKING_PER_S
        return self._guests_work


class InFlightWindow:
    """Begins with one small request, whose answer tells how far the target is: several would wait
    for each other, and a local target would be taken for a distant one, with fresh memory for each.
    To one that was never quick, GROWTH more with each answer, so four times as many each round
    trip.
    """

    def __init__(
        self, request_bytes: int, load: CopierLoad, *, opening_bytes: int = 0, granularity: int = 1
    ) -> None:
        """`request_bytes`: the largest request, but for one of `opening_bytes`; `granularity`: the
        smallest."""
        self._request_bytes = request_bytes
        self._probe_bytes = min(request_bytes, max(PROBE_BYTES, granularity))
        self._opening_bytes = opening_bytes
        self._largest_bytes = 0
        self._load = load
        self._quickest_s = math.inf
        self._answers = 0
        self._writes = 0
        self._delay = Delay()
        self._room_bytes = math.inf
        """What is answered within ANSWER_S; unknown until an answer was late."""
        self._estimate_bytes = math.inf
        """The same, as the last answer has it."""
        self._may_yield = True
        self.round_bytes = 0
        """Claimed, and not given back, in this round over the disk."""
        self._before_bytes = math.inf

    def begin_round(self, *, is_kept_in_sync: bool) -> None:
        """`is_kept_in_sync`: the mirror was in sync before, and need not be so as soon as may be.

        What rounds have copied tells what guests write; counting the dirty bits of 16 TiB would
        take 13 ms, with the GIL held."""
        if is_kept_in_sync:
            self._may_yield = self.round_bytes <= BACKLOG_BYTES
            self._before_bytes = math.inf
        else:
            self._may_yield = self.round_bytes <= self._before_bytes * CONVERGING
            self._before_bytes = self.round_bytes or math.inf
        self.round_bytes = 0

    @property
    def request_bytes(self) -> int:
        """Of the next request at most."""
        if self.is_late:
            return max(self._probe_bytes, self.piece_bytes_max)
        if not self._is_quick:
            return self._probe_bytes if self._answers < PROBES else self._request_bytes
        if self._largest_bytes <= self._request_bytes < self._opening_bytes:
            return self._opening_bytes
        if self._yields:
            return min(self._request_bytes, YIELDING_REQUEST_BYTES)
        return self._request_bytes

    def began(self, length: int) -> None:
        """A write of data of so many bytes."""
        self._largest_bytes = max(self._largest_bytes, length)

    def start_over(self) -> None:
        """Who answers next may be another server process, where this one was before."""
        self._largest_bytes = 0

    @property
    def is_late(self) -> bool:
        """An answer was, and that is not long ago."""
        return self._room_bytes < math.inf

    @property
    def piece_bytes_max(self) -> int:
        """Of a request, where answers are late: so small that two of them are in flight."""
        if not self.is_late:
            return OPENING_BYTES
        least = min(self._request_bytes, PROBE_BYTES)
        return max(least, min(self._request_bytes, _power_of_two(int(self._room_bytes / 2))))

    @property
    def gap_bytes(self) -> int:
        """How large a clean gap is cheaper to send than a request more."""
        return QUICK_GAP_BYTES if self._is_quick else GAP_BYTES

    def has_room(self, in_flight_bytes: int) -> bool:
        """For a claim more."""
        if in_flight_bytes and in_flight_bytes >= min(self._room_bytes, self._estimate_bytes):
            return False
        if not self._is_quick:
            return in_flight_bytes < self.request_bytes * (1 + GROWTH * self._writes)
        mirrors = max(1, self._load.count)
        room = max(1, QUICK_BYTES // mirrors // self._request_bytes) * self._request_bytes
        if self._yields:
            room = min(room, int(self._quickest_s * YIELDING_BYTES_PER_S) // mirrors)
        return in_flight_bytes < max(1, room)

    @property
    def _yields(self) -> bool:
        return self._is_quick and self._may_yield and self._load.guests_need_room

    @property
    def _is_quick(self) -> bool:
        return self._quickest_s < QUICK_WRITE_S

    def copied(self, took_s: float, length: int, in_flight_bytes: int) -> None:
        """A piece of so many bytes was read and written; so many were being when it was sent."""
        late_s = self._delay.of(took_s, is_least=in_flight_bytes <= PROBE_BYTES)
        self._estimate_bytes = in_flight_bytes * ANSWER_S / late_s if late_s > 0 else math.inf
        if late_s > ANSWER_S:
            room_bytes = max(PROBE_BYTES, _in_time(in_flight_bytes, late_s))
            self._room_bytes = min(self._room_bytes, room_bytes)
        elif self.is_late and late_s < ANSWER_S / 2:
            self._room_bytes += length
            if self._room_bytes > ROOM_BYTES_MAX:
                self._room_bytes = math.inf

    def answered(self, took_s: float, *, is_zero: bool = False) -> None:
        """A write was answered, or a write of zeroes: this may take its time at a target that is
        near, so it never means that more should be in flight."""
        self._quickest_s = min(self._quickest_s, took_s / max(1, self._load.count))
        self._answers += 1
        self._writes += not is_zero


def _in_time(length: int, took_s: float) -> int:
    """How much is answered in ANSWER_S where `length` took longer."""
    return _power_of_two(max(1, int(length * ANSWER_S / took_s)))


def _power_of_two(length: int) -> int:
    """The largest one that is not above it."""
    return 1 << (length.bit_length() - 1)
