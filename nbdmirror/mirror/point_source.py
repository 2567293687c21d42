"""PointSource: the points of one disk, from the cut until they are committed or broken. What is
between is the sender's: it reads each point's content (`view`) and brings it to the far side.

    prepare -> take (behind the gate, cut.py) -> view ... -> committed
                                                   '-------> broken, by the store, the source, or
                                                             the sender (`break_off`)

One point follows another. A broken point costs nothing but time: its granules belong to the next
one. On the event loop's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from nbdmirror.devices.base import AsyncSource, Done, ExtentsDone
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.changes import Changes
from nbdmirror.disk.fine import FineBitmap
from nbdmirror.disk.frozen import Frozen
from nbdmirror.disk.saved import SavedGranules, Spill
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.buffers import Buffers
from nbdmirror.mirror.frozen_view import Chunk, FrozenView
from nbdmirror.mirror.point_lag import PointLag

log = logging.getLogger(__name__)

STORE_BYTES_DEFAULT = 64 << 20
"""Default of x-nbdmirror-store-bytes."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What becomes of content that guests overwrite before it was read."""

    memory_bytes: int = STORE_BYTES_DEFAULT
    spill: Spill | None = None
    """Where content goes for which memory has no room."""
    breaks_guest_writes: bool = False
    """on-cbw-error: break-guest-write, and not break-snapshot."""


class PointSource:
    """`on_chunk` gets the content of the points. `on_more`: `view.read_next` has more to read.
    `on_broken`: the point is given up, and why."""

    def __init__(
        self,
        *,
        changes: Changes,
        source: AsyncSource,
        lag: PointLag,
        loop: Loop,
        store: StoreOptions,
        on_chunk: Callable[[Chunk], None],
        on_more: Callable[[], None],
        on_broken: Callable[[BaseException], None],
    ) -> None:
        self.changes = changes
        self.lag = lag
        self.view: FrozenView | None = None
        """The content of the point in progress."""
        self._source = source
        self._loop = loop
        self._store = store
        self._on_chunk = on_chunk
        self._on_more = on_more
        self._on_broken = on_broken
        self._buffers = Buffers()

    @property
    def has_changes(self) -> bool:
        """Guests have changed something since the last cut."""
        return not self.changes.dirty.is_empty

    def prepare(self) -> None:
        """Allocate what `take` needs, before guests are held."""
        self.changes.prepare()

    def take(self) -> None:
        """Begin a point: the `take` of a Cut."""
        at_s = self._loop.clock()
        frozen = self.changes.cut(self._freeze)
        self.lag.cut(at_s)
        self.view = FrozenView(frozen, self._source, on_chunk=self._on_chunk, buffers=self._buffers)

    def committed(self) -> bool:
        """The point is on the far side's storage, as a whole. False if it was broken before: then
        it does not count, and its granules are in the next point too."""
        if self.changes.frozen is None or self.changes.frozen.error is not None:
            return False
        assert self.view is not None and self.view.is_settled, "a point that was not sent"
        self.view = None
        self.changes.committed()
        self.lag.committed()
        return True

    def break_off(self, error: BaseException) -> None:
        """Give the point in progress up, if there is one: the far side does not get the rest.
        `on_broken` is called soon."""
        if self.changes.frozen is not None:
            self.changes.frozen.break_off(error)

    def end(self) -> None:
        """Make no more points, and stop tracking changes. `on_broken` is not called any more."""
        self.view = None
        self.changes.end()
        self.lag.end()

    def _freeze(self, covered: FineBitmap, done: DirtyBitmap) -> Frozen:
        frozen = Frozen(
            covered,
            done,
            SavedGranules(self._store.memory_bytes, self._store.spill),
            breaks_guest_writes=self._store.breaks_guest_writes,
            on_broken=lambda: self._loop.call_soon(lambda: self._broken(frozen)),
            on_saved=lambda: self._loop.call_soon(self._on_more),
            latency=self.changes.disk.ledger.latency,
        )
        return frozen

    def _broken(self, frozen: Frozen) -> None:
        if self.changes.frozen is not frozen or frozen.error is None:
            return  # ended meanwhile
        log.info("disk %s: a point is given up: %s", self.changes.disk.name, frozen.error)
        self.view = None
        self.changes.broken()
        self.lag.broken()
        self._on_broken(frozen.error)


class NotedSource(AsyncSource):
    """A source whose errors can be told from those of the far side."""

    def __init__(self, source: AsyncSource) -> None:
        self.size = source.size
        self.error: BaseException | None = None
        self._source = source

    def start_read(self, buf: memoryview, offset: int, done: Done) -> None:
        def then(error: BaseException | None) -> None:
            self.error = error or self.error
            done(error)

        self._source.start_read(buf, offset, then)

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        self._source.start_extents(offset, length, done)
