"""What is kept of a disk that no guest changes: nothing is saved again. The first change ends
that."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from nbdmirror.disk.tracker import Tracker
from nbdmirror.state.checkpoint import Bits, Checkpoints
from nbdmirror.state.intent_log import SLOTS, slot_bytes
from nbdmirror.state.journal import JOURNAL_BYTES, Journal, Regions
from nbdmirror.state.recent import RECENT_BYTES

SIZE = 4 << 20
GRANULARITY = 1 << 16


class StillWriter:
    """Calls are carried out at once, and timers never."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.later: list[Callable[[], None]] = []

    def clock(self) -> float:
        return self.now_s

    def submit(self, call: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        try:
            call()
        except OSError as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        return future

    flush = submit

    def then(self, future: Future[None], done: Callable[[Any], None]) -> None:
        done(future.exception())

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.later.append(call)


class Slots:
    """The log of intents, in memory."""

    def __init__(self) -> None:
        self.writes = 0

    def write(self, index: int, content: bytes, *, sync: bool) -> None:
        assert index < SLOTS and len(content) <= slot_bytes(SIZE)
        self.writes += 1

    def read(self, index: int) -> bytes:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Kept:
    """A disk with a mirror, and what is saved of it."""

    def __init__(self, still: StillWriter | None = None) -> None:
        writer: Any = still or StillWriter()
        self.writer = writer
        self.memory = bytearray(JOURNAL_BYTES)
        self.journal = Journal(memoryview(self.memory), memoryview(bytearray(RECENT_BYTES)))
        slots: Any = Slots()
        self.slots = slots
        self.regions = Regions(
            disk_id="0" * 32,
            size=SIZE,
            slots=self.slots,
            clock=self.writer.clock,
            on_error=lambda error: None,
        )
        self.journal.regions = self.regions
        self.tracker = Tracker(SIZE, GRANULARITY)
        self.calls: list[str] = []
        self.saved: list[bytes] = []
        self.error: OSError | None = None
        self.checkpoints = Checkpoints(
            journal=self.journal,
            regions=self.regions,
            writer=self.writer,
            bits=lambda: {"mirror": self.tracker.may_differ().to_bytes()},
            write=self._write,
            flush=lambda: self.calls.append("flush"),
            is_at_rest=lambda: self.tracker.is_at_rest,
        )

    def _write(self, bits: Bits) -> None:
        self.calls.append("write")
        if self.error is not None:
            raise self.error
        self.saved.append(bits["mirror"])

    def tick(self) -> list[str]:
        """What a checkpoint did, if there was one."""
        self.calls = []
        log = self.slots.writes
        self.checkpoints.tick()
        return [*self.calls, *["log"] * (self.slots.writes - log)]

    def change(self, offset: int = 0) -> None:
        """A guest writes, the mirror copies that, and the target is flushed."""
        slot = self.journal.begin(offset, 512)
        self.tracker.dirty.mark(offset, 512)
        self.journal.end(slot)

    def copy(self) -> None:
        while claim := self.tracker.claim(0, SIZE):
            self.tracker.settle(claim, failed=False)
        self.tracker.end_flush(self.tracker.begin_flush(), failed=False)
        self.tracker.renew_backlog()

    def come_to_rest(self) -> None:
        self.copy()
        for _ in range(4):
            self.tick()
        assert self.tick() == [] and self.regions.is_empty


def test_at_rest_nothing_is_saved() -> None:
    kept = Kept()
    kept.come_to_rest()
    before = kept.regions.touched
    for _ in range(100):
        assert kept.tick() == []
    assert kept.regions.touched is before, "a period of the log of intents begins in vain"


def test_the_first_change_is_saved_at_the_next_checkpoint() -> None:
    """Also if the mirror has copied all of it by then: the region must leave the log again, and
    with it the intervals count as before."""
    for is_copied in (False, True):
        kept = Kept()
        kept.come_to_rest()
        kept.change()
        if is_copied:
            kept.copy()
        assert "write" in kept.tick()
        assert kept.saved[-1] == kept.tracker.may_differ().to_bytes()
        kept.come_to_rest()
        assert not any(kept.saved[-1]), "what was copied is not dirty any more"


def test_what_is_dirty_without_a_guest_is_saved() -> None:
    """The mirror begins again, or a flush of the target has failed."""
    kept = Kept()
    kept.come_to_rest()
    kept.tracker.mark_all()
    assert kept.tick() == ["write"]
    kept.come_to_rest()
    assert not any(kept.saved[-1])


def test_who_asks_for_a_checkpoint_gets_one() -> None:
    kept = Kept()
    kept.come_to_rest()
    assert kept.checkpoints.make().done()
    assert kept.tick() == []


def test_after_a_failure_the_next_checkpoint_saves() -> None:
    kept = Kept()
    kept.come_to_rest()
    kept.change()
    kept.copy()
    kept.error = OSError(28, "the state directory is full")
    for _ in range(3):
        assert "write" in kept.tick()
    kept.error = None
    assert "write" in kept.tick()
    kept.come_to_rest()
    assert kept.saved[-1] == kept.tracker.may_differ().to_bytes()


def test_a_log_that_begins_anew_is_flushed_for() -> None:
    """Earlier writes were not in the log, and a power cut may take them back."""
    kept = Kept()
    kept.come_to_rest()
    kept.checkpoints.begin_anew()
    assert kept.tick() == ["flush", "write"]
    assert kept.tick() == []
