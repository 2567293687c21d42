"""StateStore: saves one disk's mirror and bitmaps. NullStore is for servers without a state
directory; store.DiskStore is the other one.

All methods are called on the event loop's thread, and none of them waits for the disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from nbdmirror.devices.base import Done
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.changes import MayDiffer
from nbdmirror.disk.remainder import Remainder
from nbdmirror.state.disk_record import BitmapRecord, MirrorRecord
from nbdmirror.state.spill import SpillFile

FORGET_S_MAX = 0.5
"""How long a forced cancel waits until the end is on disk, and guests until an end is undone."""

NewBitmap = Callable[[int, int], DirtyBitmap]
"""Creates a clean bitmap of a size and a granularity, both in bytes."""


def done_future() -> Future[None]:
    """A future that is done, without an error."""
    future: Future[None] = Future()
    future.set_result(None)
    return future


class StateStore(ABC):
    """Errors are given to `done` or to the future, and are never raised."""

    is_lasting: bool
    """Whether state is saved."""

    @abstractmethod
    def new_bitmap(self, key: str) -> NewBitmap:
        """Returns the function that creates the bitmaps of `key`."""

    @abstractmethod
    def remainder(self, key: str) -> Remainder | None:
        """Where the mirror `key` keeps which parts its target's storage lacks; None: nowhere."""

    @abstractmethod
    def new_spill(self, size: int, call_soon: Callable[[Callable[[], None]], None]) -> SpillFile:
        """A new file of at most `size` bytes beside what is saved, of a lasting store."""

    @abstractmethod
    def keep_mirror(self, record: MirrorRecord, changes: Mapping[str, MayDiffer]) -> None:
        """Save this mirror, which is new or has changed. `changes`: by the keys in the record."""

    @abstractmethod
    def note_point(self, number: int, time_ns: int) -> None:
        """The mirror has committed the point of this number and wall time, or has none yet (0).
        Call this before its changes count as committed."""

    @abstractmethod
    def prepare_end(self, pivot_to: str, done: Done) -> None:
        """Prepare the end of a mirror that has succeeded; with a pivot if `pivot_to`, the target's
        URI, is not empty. All that takes time happens here."""

    @abstractmethod
    def commit_end(self, done: Done) -> None:
        """Record that the mirror has ended. If `done` gets no error the record is on disk;
        otherwise nothing has changed."""

    @abstractmethod
    def undo_end(self, done: Done) -> None:
        """The mirror continues, although `commit_end` has recorded its end. `done` is called when
        that is on disk, or after FORGET_S_MAX seconds: guests' writes would go to a side that is
        not the disk, as far as the disk's record knows."""

    @abstractmethod
    def end_is_final(self) -> None:
        """The mirror is over, and no end of it will be undone."""

    @abstractmethod
    def forget_mirror(self, done: Done) -> None:
        """Record that the mirror was cancelled or has failed. `done` is called when that is on
        disk, or after FORGET_S_MAX seconds."""

    @abstractmethod
    def keep_bitmap(self, record: BitmapRecord, bitmap: DirtyBitmap) -> None:
        """Save this persistent bitmap, which is new or has changed."""

    @abstractmethod
    def drop_bitmap(self, key: str) -> None:
        """This bitmap was removed, or is not persistent any more."""

    @abstractmethod
    def saved(self) -> Future[None]:
        """Done when all changes until now are on disk; else it has the error."""

    @abstractmethod
    def bits_saved(self) -> Future[None]:
        """Done when all present dirty bits are on disk as well; else it has the error."""


class NullStore(StateStore):
    """Saves nothing."""

    is_lasting = False

    def new_bitmap(self, key: str) -> NewBitmap:
        return DirtyBitmap

    def remainder(self, key: str) -> Remainder | None:
        return None

    def new_spill(self, size: int, call_soon: Callable[[Callable[[], None]], None]) -> SpillFile:
        raise AssertionError("there is no state directory")

    def keep_mirror(self, record: MirrorRecord, changes: Mapping[str, MayDiffer]) -> None:
        pass

    def note_point(self, number: int, time_ns: int) -> None:
        pass

    def prepare_end(self, pivot_to: str, done: Done) -> None:
        done(None)

    def commit_end(self, done: Done) -> None:
        done(None)

    def undo_end(self, done: Done) -> None:
        done(None)

    def end_is_final(self) -> None:
        pass

    def forget_mirror(self, done: Done) -> None:
        done(None)

    def keep_bitmap(self, record: BitmapRecord, bitmap: DirtyBitmap) -> None:
        pass

    def drop_bitmap(self, key: str) -> None:
        pass

    def saved(self) -> Future[None]:
        return done_future()

    def bits_saved(self) -> Future[None]:
        return done_future()
