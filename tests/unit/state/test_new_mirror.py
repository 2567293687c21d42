"""A mirror that begins while an earlier checkpoint is under way: what guests wrote before is in no
region, and the disk must be flushed for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from unit.state.test_rest import SIZE, Kept, StillWriter

from nbdmirror.disk.tracker import Tracker

GRANULE = 1 << 16


class HeldWriter(StillWriter):
    """A flush ends when `answer` is called."""

    def __init__(self) -> None:
        super().__init__()
        self.flushes: list[Callable[[], None]] = []

    def flush(self, call: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()

        def end() -> None:
            call()
            future.set_result(None)

        self.flushes.append(end)
        return future

    def then(self, future: Future[None], done: Callable[[BaseException | None], None]) -> None:
        future.add_done_callback(lambda future: done(future.exception()))


class Fresh(Kept):
    """A disk of which nothing is kept yet."""

    def __init__(self) -> None:
        self.held = HeldWriter()
        super().__init__(self.held)
        self.journal.regions = None

    def begin_mirror(self) -> None:
        self.tracker = Tracker(SIZE, GRANULE)
        self.tracker.mark_all()
        self.checkpoints.begin_anew()
        self.journal.regions = self.regions
        self.copy()

    def answer(self) -> None:
        self.held.flushes.pop(0)()

    @property
    def told(self) -> bytes:
        """What is dirty after a power cut, beside the regions; nothing saved: everything."""
        return self.saved[-1] if self.saved else b"\xff"


def test_a_mirror_that_begins_during_a_flush_has_one_of_its_own() -> None:
    """The flush under way began before the last writes that are in no region."""
    fresh = Fresh()
    asked = fresh.checkpoints.make()
    assert len(fresh.held.flushes) == 1, "the flush has begun"
    fresh.journal.end(fresh.journal.begin(0, 512))
    fresh.begin_mirror()
    fresh.answer()
    assert any(fresh.told), "a power cut takes back a write that the target has, and nobody knows"
    assert not asked.done()
    fresh.answer()
    assert asked.done() and not any(fresh.told)
    assert fresh.calls == ["flush", "flush", "write"]


def test_a_write_from_before_the_mirror_is_waited_for() -> None:
    """It is in no region, and its mark comes when it ends: after that the disk is flushed. The
    mirror began while the checkpoint waited for another write."""
    fresh = Fresh()
    first = fresh.journal.begin(0, 512)
    fresh.checkpoints.make()
    late = fresh.journal.begin(GRANULE, 512)
    fresh.begin_mirror()
    fresh.journal.end(first)
    fresh.held.later.pop()()
    assert not fresh.held.flushes, "a flush now would not cover the write under way"
    fresh.tracker.dirty.mark(GRANULE, 512)
    fresh.journal.end(late)
    fresh.held.later.pop()()
    fresh.answer()
    assert any(fresh.told)
