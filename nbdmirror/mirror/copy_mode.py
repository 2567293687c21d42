"""CopyModeSwitch: a mirror's copy mode, switched while guests write.

When a request begins, it is decided whether its write is synchronous (rule 11). So a switch affects
later requests only, at once. `has_drained` reports when the earlier requests have ended. On the
event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nbdmirror.devices.base import BlockDevice
from nbdmirror.disk.disk import Disk, SynchronousWrites
from nbdmirror.disk.hot import HotGranules
from nbdmirror.disk.tracker import Tracker


class CopyModeSwitch:
    """Begins in background mode. `on_error` is called, on a guest's thread, when a synchronous
    write fails on the target."""

    def __init__(
        self,
        *,
        disk: Disk,
        tracker: Tracker,
        target: BlockDevice,
        whole_granules: bool,
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._disk = disk
        self._tracker = tracker
        self._new_writes = partial(
            SynchronousWrites,
            tracker=tracker,
            target=target,
            whole_granules=whole_granules,
            on_error=on_error,
            latency=disk.ledger.latency,
        )
        self._writes = self._new_writes()
        self._is_given_up = False
        self._leaving: frozenset[int] = frozenset()
        self._is_actively_synced = False

    def turn(self, *, synchronous: bool, hot: HotGranules | None = None) -> None:
        """Switch the copy mode for requests that begin from now on. `hot`: only those that touch
        these granules are synchronous."""
        if synchronous != (self._disk.synchronous is not None) or hot is not self._writes.only:
            if synchronous and self._is_given_up:
                self._writes, self._is_given_up = self._new_writes(), False
            self._writes.only = hot
            self._disk.synchronous = self._writes if synchronous else None
            self._leaving = self._disk.ledger.writes()
            self._is_actively_synced = False

    def has_drained(self) -> bool:
        """Whether the requests that began before the last switch have ended, or can no longer write
        to this mirror's target."""
        self._leaving = self._disk.ledger.writes_left(self._leaving)
        return not self._leaving or (self._is_given_up and self._writes.give_up())

    def disown(self) -> None:
        """Do not wait any longer for requests at the source, which may hang."""
        self._is_given_up = True

    def is_in_sync(self) -> bool:
        """Whether nothing is dirty or in flight. If the requests from before the last switch had
        ended earlier, this lasts."""
        self.has_drained()  # before the look at what is dirty: a request that ends marks
        if not self._tracker.in_sync:
            return False
        is_all = self._disk.synchronous is not None and self._writes.only is None
        if is_all and not self._leaving:
            self._is_actively_synced = True
        return True

    def note_error(self) -> None:
        """A write on the target has failed: not actively synced any more."""
        self._is_actively_synced = False

    @property
    def hot_bytes(self) -> int | None:
        """Only writes to so many bytes, which are hot, are synchronous; None: all writes, or
        none."""
        hot = self._writes.only
        return None if hot is None or self._disk.synchronous is None else hot.size

    @property
    def is_background(self) -> bool:
        """No request is synchronous, and none that began earlier may be."""
        return self._disk.synchronous is None and not self._leaving

    @property
    def is_actively_synced(self) -> bool:
        """Each answered write of a guest is on the target."""
        return self._is_actively_synced
