"""Transient: what is kept of a disk where there is no state directory, which is nothing. It says
what store.DiskStore's methods mean."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from nbdmirror.devices.base import Done
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.ledger import Tracker
from nbdmirror.state.definition import BitmapRecord, MirrorRecord

FORGET_S_MAX = 0.5
"""How long a job that was cancelled by force waits until that is on disk."""

NewBitmap = Callable[[int, int], DirtyBitmap]


class Transient:
    """Nothing outlives the process. The methods are DiskStore's."""

    is_lasting = False

    def new_bitmap(self, key: str) -> NewBitmap:
        """What makes the bitmaps of `key`."""
        return DirtyBitmap

    def keep_mirror(self, record: MirrorRecord, tracker: Tracker) -> None:
        """There is this mirror now, or it has changed."""

    def prepare_end(self, pivot_to: str, done: Done) -> None:
        """The mirror is about to end well; with a pivot if `pivot_to`, the target's URI, is not
        empty. Does beforehand what takes time."""
        done(None)

    def commit_end(self, done: Done) -> None:
        """It ends now. If `done` is told no error, that is on disk; otherwise nothing has
        changed."""
        done(None)

    def undo_end(self) -> None:
        """The mirror goes on after all, though `commit_end` was told that it ended."""

    def forget_mirror(self, done: Done) -> None:
        """It has ended otherwise. `done` is called when that is on disk, or after FORGET_S_MAX."""
        done(None)

    def keep_bitmap(self, record: BitmapRecord, bitmap: DirtyBitmap) -> None:
        """There is this persistent bitmap now, or it has changed."""

    def drop_bitmap(self, key: str) -> None:
        """It is no more, or not persistent."""

    def saved(self) -> Future[None]:
        """Done when what there is, as far as it was said until now, is on disk; else it has the
        error."""
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def bits_saved(self) -> Future[None]:
        """The same of what is dirty."""
        return self.saved()
