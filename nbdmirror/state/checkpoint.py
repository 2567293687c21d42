"""Checkpoints: saves the dirty bits regularly, in an order in which the log of intents covers the
time in between (journal.py). On the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from nbdmirror.state.journal import Journal, Regions
from nbdmirror.state.writer import Writer

DRAIN_POLL_S = 0.02

Bits = dict[str, bytes]
"""DirtyBitmap.to_bytes of each bitmap, by its key."""


class Checkpoints:
    """`bits` returns the present dirty bits; `write` saves them, on the writer's thread."""

    def __init__(
        self,
        *,
        journal: Journal,
        regions: Regions,
        writer: Writer,
        bits: Callable[[], Bits],
        write: Callable[[Bits], None],
        flush: Callable[[], None],
        is_at_rest: Callable[[], bool],
    ) -> None:
        """`flush` makes guests' writes durable, on the flushing thread: while the disk takes its
        time, other state is saved, such as the end for which guests are held. `is_at_rest`: nothing
        is dirty, and only a guest's change, or one for which `make` is called, changes that."""
        self._journal = journal
        self._regions = regions
        self._writer = writer
        self._bits = bits
        self._write = write
        self._flush = flush
        self._is_at_rest = is_at_rest
        self._was_at_rest = False
        """At the last save, which succeeded."""
        self._written: Bits | None = None
        self._is_running = False
        self._must_flush = True
        self._waiting: list[Future[None]] = []
        """Callers that wait for a checkpoint that begins after their call."""

    def begin_anew(self) -> None:
        """The log of intents is used from now on. Earlier writes are in no region, and a power cut
        may take them back as well: flush with the next checkpoint, and in one that is in
        progress begin again."""
        self._must_flush = True
        self._written = None
        self._was_at_rest = False

    def tick(self) -> None:
        """Begin a checkpoint, unless one is in progress, or there is nothing to save."""
        is_saved = self._was_at_rest and self._regions.is_empty and self._is_at_rest()
        if not self._is_running and not is_saved:
            self._begin()

    def make(self) -> Future[None]:
        """Make a checkpoint that begins after this call. The future gets its error."""
        future: Future[None] = Future()
        self._waiting.append(future)
        if not self._is_running:
            self._begin()
        return future

    def _begin(self) -> None:
        self._is_running = True
        asked, self._waiting = self._waiting, []
        must_flush, self._must_flush = self._must_flush, False
        self._regions.cut()
        before = self._journal.under_way()

        def look() -> None:
            if self._journal.has_drained(before):
                self._flush_first(asked, must_flush=must_flush)
            else:
                self._writer.call_later(DRAIN_POLL_S, look)

        look()

    def _flush_first(self, asked: list[Future[None]], *, must_flush: bool) -> None:
        def flushed(error: BaseException | None) -> None:
            if error is not None:
                self._must_flush = self._must_flush or must_flush
                self._end(asked, error)
            elif self._must_flush:
                # `begin_anew` came meanwhile. Neither the wait nor the flush was for all writes
                # that are in no region.
                self._waiting = asked + self._waiting
                self._begin()
            else:
                self._save(asked)

        if (must_flush or self._regions.may_retire) and not self._must_flush:
            self._writer.then(self._writer.flush(self._flush), flushed)
        else:
            flushed(None)

    def _save(self, asked: list[Future[None]]) -> None:
        """The bits are read after the flush. A write that is newer than the flush is in a region
        that was touched since the cut, and stays in the log."""
        is_at_rest, bits = self._is_at_rest(), self._bits()
        is_new = bool(bits) and (bits != self._written or self._regions.was_touched)

        def done(error: BaseException | None) -> None:
            self._written = bits if error is None else None
            self._was_at_rest = is_at_rest and error is None
            self._end(asked, error)

        put = partial(self._put, bits, is_new=is_new)
        self._writer.then(self._writer.submit(put), done)

    def _put(self, bits: Bits, *, is_new: bool) -> None:
        if is_new:
            self._write(bits)
        self._regions.retire()

    def _end(self, asked: list[Future[None]], error: BaseException | None) -> None:
        self._is_running = False
        for future in asked:
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
        if self._waiting:
            self._begin()
