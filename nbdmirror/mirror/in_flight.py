"""InFlightWindow: how much of a copier's work may be in flight now. On the event loop's thread."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

from nbdmirror.mirror.request_cost import RequestCost

QUICK_BYTES = 4 << 20
"""Bytes in flight to targets that answer quickly, of all mirrors together. 4 MiB stay in the
processor's cache on their way to a local server. With 16 MiB copies take a tenth longer; with four
mirrors of 4 MiB each, half as long again."""

PROBES = 16
PROBE_BYTES = 64 << 10
"""At most so many requests are small, until one is answered quickly. The time of a small answer is
the distance of the target; it does not depend on the target's throughput or on fresh memory."""

OPENING_BYTES = 4 << 20
"""Length of one write, the first large one to a quick target. A server with glibc's malloc, such as
qemu-nbd and QEMU, gets a buffer that is larger than all before it from the kernel, and returns it
after the request. The kernel then clears and maps 256 pages again for each MiB: two thirds of what
a copy costs such a target. After the server has freed a larger buffer, it keeps smaller ones, up to
twice that size in total. (mallopt(3), M_MMAP_THRESHOLD; docs/measurements/2026-11-28.md.)"""

QUICK_WRITE_S = 0.002
"""A target that has answered within this time is quick: 4 MiB in 2 ms are more than its link
carries. The time is multiplied by the number of mirrors that copy just then, since they wait for
each other. A slower target has as much in flight as fits into buf-size."""

ANSWER_S = 0.5
"""An answer may take so much longer than the quickest one. After a later answer, requests become
smaller. So a slow storage answers each request soon: the job's progress shows, a pause takes
effect, and the storage does not look like one that hangs."""

CLAIM_BYTES_MAX = 32 << 30
"""Longest claim of a range whose extents are not known: a hole of this length is one claim, if the
target zeroes so quickly. Long enough for the bitmap to free whole pages."""

ZERO_BYTES_MAX = CLAIM_BYTES_MAX
"""Largest zero request. A target whose lengths have 32 bits gets it in pieces."""

STRIDE_GROWTH = 8

ROOM_BYTES_MAX = 1 << 30
"""The largest `buf-size`: more room is never needed."""

GROWTH = 3
"""With 1 a copy over a link of 20 ms takes two round trips more to get going."""

COPYING_PROCESSORS = 2
"""Processors that copies keep busy with more than one large request in flight: one reads and sends,
one receives at the target. A machine with no more than these would make guests wait."""

YIELDING_BYTES_PER_S = 1e9
"""Throughput for which requests are in flight while a copy yields to guests, if the target answers
as quickly as it once did: one large request to a local target, or one or two small ones; more over
a network."""

YIELDING_REQUEST_BYTES = 512 << 10
"""Length of requests while a copy yields. The kernel copies each request in one go, and a guest's
request waits for that. Shorter requests do not help guests, and slow the copy down; with 1 MiB both
are slower."""

CONVERGING = 0.6
"""If a round copies more than this part of the round before, the next round does not yield to
guests: with a guest that writes so fast, no round would be the last."""

BACKLOG_BYTES = 64 << 20
"""The same bound, in bytes, for a mirror that is only kept in sync, with four rounds a second."""

GAP_BYTES, QUICK_GAP_BYTES = 1 << 10, 16 << 10
"""A clean gap of so many bytes between two dirty places is sent with them, to save a request. At a
quick target a request costs as much processor time as 64 KiB or more; with a quarter of that, the
mirror sends at most a fifth more than was changed. That holds while little is dirty at once: not
for what is copied again after a kill, which is sent without such gaps. Over a link bytes count (a
request and its answer have 100), and fewer requests wait. At a slow target the gap is what
RequestCost has measured, if that is larger."""

LOOK_S = 0.1
WORKING_PER_S = range(100, 10_000)
"""Requests per second of guests at work. Fewer are a journal's occasional write. Guests with more
keep a processor busy by themselves."""


class Delay:
    """How much longer an answer took than the quickest possible one. A distant storage takes its
    time for every answer, and a smaller request would not help."""

    def __init__(self) -> None:
        self._least_s = math.inf

    def of(self, took_s: float, *, is_least: bool) -> float:
        """Seconds that `took_s` is longer than the least time. `is_least`: this request was the
        smallest one, so its time is the new least time."""
        self._least_s = took_s if is_least else min(self._least_s, took_s)
        return took_s - self._least_s


class Stride:
    """Length of the next request of one kind, in bytes: grows while answers come quickly, shrinks
    after a late answer. Storages that unmap zero six orders of magnitude faster than storages that
    write zeroes."""

    def __init__(self, first: int, most: int) -> None:
        self.length = self._first = first
        self._most = most
        self._delay = Delay()

    @property
    def is_longest(self) -> bool:
        """The longest request is allowed."""
        return self.length == self._most

    def answered(self, length: int, took_s: float) -> None:
        """A request of `length` bytes was answered after `took_s` seconds."""
        least = min(self._first, PROBE_BYTES)
        late_s = self._delay.of(took_s, is_least=length <= least)
        if late_s > ANSWER_S:
            self.length = max(least, min(self.length, _in_time(length, late_s)))
        elif length >= self.length and late_s * STRIDE_GROWTH <= ANSWER_S:
            self.length = min(self._most, self.length * STRIDE_GROWTH)

    def start_over(self) -> None:
        """The next answer may come from a slower server: begin small again."""
        self.length = min(self.length, self._first)


class Holes:
    """How much of a hole is one claim, and how much of a claim one zero request covers, in
    bytes."""

    def __init__(self, request_bytes: int) -> None:
        """`request_bytes`: the first length of both."""
        self._request_bytes = request_bytes
        self._asked = Stride(request_bytes, CLAIM_BYTES_MAX)
        self.zeroed = Stride(request_bytes, ZERO_BYTES_MAX)
        self.is_inside = False
        """The last block status was a hole."""

    @property
    def claim_bytes(self) -> int:
        """Length of the next claim: one request at most, for a target that does not zero
        quickly."""
        is_quick = self.zeroed.is_longest
        return self._asked.length if is_quick else min(self._asked.length, self.zeroed.length)

    def found(self, length: int, took_s: float, *, is_hole: bool) -> None:
        """The source has answered with the extents of `length` bytes."""
        self.is_inside = is_hole
        if is_hole:
            self._asked.answered(max(length, self._request_bytes), took_s)
        else:
            self._asked.start_over()


class CopierLoad:
    """The load that the copiers of one event loop share with each other, and with guests.

    `new_requests` returns the number of guests' requests that began since its last call.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        new_requests: Callable[[], int],
        processors: int | None = None,
    ) -> None:
        """`processors`: None for the number that this process may run on."""
        self.count = 0
        """Number of copiers with claims in flight."""
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
    """How many bytes of one copier may be in flight, and how large the next request may be.

    The window begins with one small request, whose answer shows how distant the target is. Several
    requests would wait for each other, each with fresh memory, and a local target would look
    distant. For a target that was never quick, each answer adds GROWTH requests: four times as many
    in each round trip.
    """

    def __init__(
        self, request_bytes: int, load: CopierLoad, *, opening_bytes: int = 0, granularity: int = 1
    ) -> None:
        """Bytes. `request_bytes`: the largest request, except one of `opening_bytes`;
        `granularity`: the smallest request."""
        self._request_bytes = request_bytes
        self._probe_bytes = min(request_bytes, max(PROBE_BYTES, granularity))
        self._opening_bytes = opening_bytes
        self._largest_bytes = 0
        self._load = load
        self._cost = RequestCost()
        self._quickest_s = math.inf
        self._answers = 0
        self._writes = 0
        self._delay = Delay()
        self._room_bytes = math.inf
        """Bytes that the target answers within ANSWER_S; unknown (inf) until an answer was late."""
        self._estimate_bytes = math.inf
        """The same, by the last answer alone."""
        self._may_yield = True
        self.round_bytes = 0
        """Bytes claimed, and not given back, in this round over the disk."""
        self._before_bytes = math.inf
        self._is_kept_in_sync = False
        self.leaves_room = False
        """Only guests were the reason when the last answer of `has_room` was no."""

    def begin_round(self, *, is_kept_in_sync: bool) -> None:
        """`is_kept_in_sync`: the mirror was in sync before, and need not hurry.

        The bytes of the last rounds show how fast guests write. Counting the dirty bits of 16 TiB
        would take 13 ms, with the GIL held."""
        self._is_kept_in_sync = is_kept_in_sync
        if is_kept_in_sync:
            self._may_yield = self.round_bytes <= BACKLOG_BYTES
            self._before_bytes = math.inf
        else:
            self._may_yield = self.round_bytes <= self._before_bytes * CONVERGING
            self._before_bytes = self.round_bytes or math.inf
        self.round_bytes = 0

    @property
    def request_bytes(self) -> int:
        """Largest length of the next request."""
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
        """A write of `length` bytes of data has begun."""
        self._largest_bytes = max(self._largest_bytes, length)

    def start_over(self) -> None:
        """The next answer may come from another server process in the same place."""
        self._largest_bytes = 0

    @property
    def is_late(self) -> bool:
        """An answer was late, not long ago."""
        return self._room_bytes < math.inf

    @property
    def piece_bytes_max(self) -> int:
        """Largest request while answers are late: so small that two of them are in flight."""
        if not self.is_late:
            return OPENING_BYTES
        least = min(self._request_bytes, PROBE_BYTES)
        return max(least, min(self._request_bytes, _power_of_two(int(self._room_bytes / 2))))

    @property
    def gap_bytes(self) -> int:
        """Largest clean gap, in bytes, that is cheaper to send than one more request."""
        if self._is_quick and self._is_kept_in_sync:
            return QUICK_GAP_BYTES
        return max(GAP_BYTES, self._cost.in_bytes)

    def has_room(self, in_flight_bytes: int) -> bool:
        """Whether one more claim may begin, with `in_flight_bytes` in flight."""
        self.leaves_room = False
        if in_flight_bytes and in_flight_bytes >= min(self._room_bytes, self._estimate_bytes):
            return False
        if not self._is_quick:
            return in_flight_bytes < self.request_bytes * (1 + GROWTH * self._writes)
        mirrors = max(1, self._load.count)
        room = max(1, QUICK_BYTES // mirrors // self._request_bytes) * self._request_bytes
        if in_flight_bytes >= room or not self._yields:
            return in_flight_bytes < room
        self.leaves_room = in_flight_bytes >= max(
            1, int(self._quickest_s * YIELDING_BYTES_PER_S) // mirrors
        )
        return not self.leaves_room

    @property
    def _yields(self) -> bool:
        return self._is_quick and self._may_yield and self._load.guests_need_room

    @property
    def _is_quick(self) -> bool:
        return self._quickest_s < QUICK_WRITE_S

    def copied(self, took_s: float, length: int, in_flight_bytes: int) -> None:
        """A piece of `length` bytes was read and written in `took_s` seconds, with
        `in_flight_bytes` in flight when it was sent."""
        late_s = self._delay.of(took_s, is_least=in_flight_bytes <= PROBE_BYTES)
        self._estimate_bytes = in_flight_bytes * ANSWER_S / late_s if late_s > 0 else math.inf
        if late_s > ANSWER_S:
            room_bytes = max(PROBE_BYTES, _in_time(in_flight_bytes, late_s))
            self._room_bytes = min(self._room_bytes, room_bytes)
        elif self.is_late and late_s < ANSWER_S / 2:
            self._room_bytes += length
            if self._room_bytes > ROOM_BYTES_MAX:
                self._room_bytes = math.inf

    def answered(self, began_s: float, now_s: float, length: int, *, is_zero: bool = False) -> None:
        """A write of `length` bytes was answered. Zeroes may take long at a near target, so their
        answers never let more be in flight."""
        self._quickest_s = min(self._quickest_s, (now_s - began_s) / max(1, self._load.count))
        self._answers += 1
        self._writes += not is_zero
        if not is_zero:
            self._cost.answered(began_s, now_s, length)


def _in_time(length: int, took_s: float) -> int:
    """Bytes that are answered in ANSWER_S, if `length` bytes took `took_s`."""
    return _power_of_two(max(1, int(length * ANSWER_S / took_s)))


def _power_of_two(length: int) -> int:
    """The largest power of two that is not above `length`."""
    return 1 << (length.bit_length() - 1)
