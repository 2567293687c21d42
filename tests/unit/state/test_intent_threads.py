"""A guest's thread that waits for the log of intents, and runs again late."""

from __future__ import annotations

import threading

from support.waiting import WAIT_S_MAX, wait_until
from unit.state.test_intent_log import MiB, Slots, on_disk, regions

WRITES_MAX = 100


class LateCondition(threading.Condition):
    """Who waits gets the lock again when `may_run` is set, whoever is notified."""

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.may_run = threading.Event(), threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.set()
        self.release()
        self.may_run.wait(WAIT_S_MAX)
        self.acquire()
        return True


class SlowSlots(Slots):
    """A write waits for `gate`. No test needs WRITES_MAX of them."""

    gate: threading.Event | None = None

    def write(self, index: int, content: bytes, *, sync: bool) -> None:
        assert self.writes < WRITES_MAX, "the log is written without end"
        super().write(index, content, sync=sync)
        if self.gate is not None:
            self.gate.wait(WAIT_S_MAX)


def test_a_region_that_leaves_before_its_thread_runs_again_is_put_on_disk_again() -> None:
    """Another thread has written it together with its own, and a checkpoint ends in between: nobody
    has touched it yet, as far as the checkpoint can see."""
    slots = SlowSlots(64 * MiB)
    log = regions(slots)
    log._changed = condition = LateCondition()
    slots.gate = threading.Event()
    first, late = (
        threading.Thread(target=log.touch, args=(number, number), daemon=True) for number in (1, 2)
    )
    before = slots.writes
    first.start()
    wait_until(lambda: slots.writes > before, "the first thread writes")
    late.start()
    assert condition.waits.wait(WAIT_S_MAX)
    slots.gate.set()
    first.join(WAIT_S_MAX)
    log.touch(3, 3)
    assert on_disk(slots) == {1, 2, 3}
    log.retire()
    assert on_disk(slots) == {1, 3}
    condition.may_run.set()
    late.join(WAIT_S_MAX)
    assert not late.is_alive() and on_disk(slots) == {1, 2, 3} and log.touched[2]
