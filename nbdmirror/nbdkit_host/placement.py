"""Placement: all threads of the server on one processor, while guests have more requests that way.

Python's threads take turns. With many requests in progress the turn passes from thread to thread
several times a request, and a thread on another processor has to be woken there. On one processor
guests with 16 small requests in flight have 1.2 to 1.6 times the requests
(docs/measurements/2026-11-30.md). Guests have fewer requests there if there is one at a time, if
requests are large, if the disk's interrupts go to another processor, or if somebody else keeps that
processor busy. So nothing is assumed here: a trial compares both by turns, for half a second, and
the better one is kept. There is another trial when the rate changes, and now and then.

Whoever places the threads by hand (taskset, CPUAffinity) is obeyed.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from typing import Protocol

from nbdmirror.disk.disk import Disk
from nbdmirror.threads import start_thread

LOOK_S, REST_LOOK_S = 0.1, 0.5
"""Between two looks at the rate; in a long rest more, since each look asks all disks."""

REST_LOOKS = 100
"""So many looks that found a rest make a long one."""

RATE_MIN = 4000
"""Requests a second. With fewer, the scheduler decides: the turns are no burden."""

RATE_REST = RATE_MIN / 10
"""A lower rate is a rest. The server's own looks at guests count as requests."""

WINDOW_S = 0.03
"""A trial compares so long, several times by turns."""

SETTLE_S = 0.005
"""Threads need this until they run where they should."""

WINDOWS = 3 * (True, False, False, True)
"""Whether the threads are bound in each window of a trial."""

GAIN_MIN = 1.07
"""The threads are bound if guests have at least so many times the requests then."""

GAIN_KEPT = 1.0
"""The same for threads that are bound already."""

PAUSE_S = (2.0, 60.0)
"""Between two trials, at least and at most. The pause doubles while the outcome is the same."""

CHANGE = 1.4
"""A rate that is so many times higher or lower than at the last trial is another load."""

_PROCESSOR = 36
"""proc(5): the field in /proc/PID/task/TID/stat, counted from behind the name."""


def start(disks: Mapping[str, Disk]) -> None:
    """Place the threads of this process, which serves `disks`, from now on."""

    def requests() -> int:
        return sum(disk.ledger.begun for disk in disks.values())

    placement = Placement(ProcessorBinding(), requests, time.monotonic)
    start_thread(placement.run, "nbdmirror-placement")


class Binding(Protocol):
    """Where threads run."""

    @property
    def has_choice(self) -> bool:
        """There is more than one processor, and nobody else has placed the threads."""

    def aim(self) -> None:
        """Choose the processor for `bind`."""

    def bind(self) -> None:
        """All threads run on one processor from now on. Again: new threads too."""

    def release(self) -> None:
        """All threads run where the scheduler likes."""


class ProcessorBinding:
    """Of all threads of this process, for one of these threads."""

    def __init__(self) -> None:
        self._allowed = os.sched_getaffinity(0)
        self._processor = min(self._allowed)
        self._is_bound = False

    @property
    def has_choice(self) -> bool:
        if not self._is_bound:
            self._allowed = os.sched_getaffinity(0)  # taskset(1) may have changed that
            return len(self._allowed) > 1
        return os.sched_getaffinity(0) == {self._processor}

    def aim(self) -> None:
        """The one on which most threads ran last: the scheduler puts them near the guests."""
        found = Counter[int]()
        for thread in _threads():
            with suppress(OSError), open(f"/proc/self/task/{thread}/stat", "rb") as file:
                found[int(file.read().rpartition(b")")[2].split()[_PROCESSOR])] += 1
        usual = [processor for processor, _ in found.most_common() if processor in self._allowed]
        self._processor = usual[0] if usual else min(self._allowed)

    def bind(self) -> None:
        self._is_bound = True
        self._set({self._processor})

    def release(self) -> None:
        if self._is_bound:
            self._is_bound = False
            self._set(self._allowed)

    def _set(self, processors: set[int]) -> None:
        for thread in _threads():
            with suppress(OSError):  # it has ended, or those processors are not ours any more
                os.sched_setaffinity(thread, processors)


class Placement:
    """Decides. `requests` returns how many requests have begun so far, `clock` monotonic
    seconds."""

    def __init__(
        self, binding: Binding, requests: Callable[[], int], clock: Callable[[], float]
    ) -> None:
        self._binding = binding
        self._requests = requests
        self._clock = clock
        self._is_better = False
        """The last trial's outcome: guests have more requests if the threads are bound."""
        self._is_bound = False
        self._pause_s = PAUSE_S[0]
        self._tried_s = -PAUSE_S[0]
        self._rate_then = 0.0
        """At the last trial, of what was chosen."""
        self._others = 0
        """Looks in a row that found another rate."""

    def run(self) -> None:
        """As long as there is a choice. Start this on a daemon thread."""
        pause = threading.Event()
        for wait_s in self.course():
            pause.wait(wait_s)

    def course(self) -> Generator[float, None, None]:
        """What to do, with the seconds to wait between the steps."""
        rests = 0
        while True:
            rate = yield from self._rate(LOOK_S if rests < REST_LOOKS else REST_LOOK_S)
            rests = rests + 1 if rate < RATE_REST else 0
            if not self._binding.has_choice:
                return
            if rate < RATE_MIN:
                self._place(False)
                self._others = 0
                continue
            is_due = self._is_due(rate)
            if not self._is_bound and (is_due or self._is_better):
                self._binding.aim()
            if is_due:
                yield from self._try()
            else:
                self._place(self._is_better)

    def _is_due(self, rate: float) -> bool:
        is_same = self._rate_then / CHANGE < rate < self._rate_then * CHANGE
        self._others = 0 if is_same else self._others + 1
        is_other_load = self._others > 1 or not self._rate_then  # one look may be half a pause
        since_s = self._clock() - self._tried_s
        return since_s >= (PAUSE_S[0] if is_other_load else self._pause_s)

    def _try(self) -> Generator[float, None, None]:
        self._tried_s = self._clock()
        rates = {True: 0.0, False: 0.0}
        for is_bound in WINDOWS:
            self._place(is_bound)
            yield SETTLE_S
            rate = yield from self._rate(WINDOW_S)
            if not self._binding.has_choice or rate < RATE_MIN:
                return  # a rest shows nothing
            rates[is_bound] += rate
        before = self._is_better
        self._is_better = rates[True] >= rates[False] * (GAIN_KEPT if before else GAIN_MIN)
        is_news = self._is_better is not before
        self._pause_s = PAUSE_S[0] if is_news else min(2 * self._pause_s, PAUSE_S[1])
        self._place(self._is_better)
        self._rate_then = rates[self._is_better] / (len(WINDOWS) / 2)

    def _place(self, is_bound: bool) -> None:
        self._is_bound = is_bound
        if is_bound:
            self._binding.bind()  # perhaps again: new threads too
        else:
            self._binding.release()

    def _rate(self, seconds: float) -> Generator[float, None, float]:
        """Requests a second, over so many seconds or some more."""
        before, began_s = self._requests(), self._clock()
        yield seconds
        return (self._requests() - before) / max(self._clock() - began_s, seconds)


def _threads() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:  # no /proc: then nothing is bound, and `has_choice` says so
        return []
