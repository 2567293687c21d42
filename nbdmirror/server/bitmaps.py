"""Named dirty bitmaps of a disk: QEMU's block-dirty-bitmap commands.

A bitmap that records is attached to the disk's ledger. A bitmap that a job uses is busy: it
continues to record, and commands on it are refused. On the event loop's thread.

The target of a running mirror can have bitmaps as well: management tools add one before a pivot.
Such a bitmap records what reaches the target from then on: what guests change, and what the mirror
had yet to copy. After a pivot the bitmap belongs to the disk.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from nbdmirror.disk.bitmap import GRANULARITY_DEFAULT, DirtyBitmap, bytes_of, check_bits
from nbdmirror.disk.disk import Disk
from nbdmirror.errors import CommandError
from nbdmirror.state.disk_record import BitmapRecord
from nbdmirror.state.null_store import StateStore
from nbdmirror.state.recovery import RecoveredState

NAME_BYTES_MAX = 1023
"""QEMU's BDRV_BITMAP_MAX_NAME_SIZE."""

BITMAPS_MAX = 256
"""Most bitmaps of all disks. Each recording bitmap adds a step to each guest's write."""

BYTES_MAX = 1 << 30
"""Most bytes of all bitmaps."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Change:
    """A change that is possible. Exactly one is called: `undo` if the transaction fails later, else
    `commit`, in the order of the actions. Both always succeed.

    What a bitmap has marked, and whether the bitmap records, changes in `commit` alone. An undo
    would come too late for what guests write meanwhile."""

    undo: Callable[[], None]
    commit: Callable[[], None] = _nothing


@dataclass(slots=True, eq=False)
class NamedBitmap:
    """A named dirty bitmap."""

    name: str
    bitmap: DirtyBitmap
    is_recording: bool
    key: str = ""
    """If persistent: names its saved content."""
    is_busy: bool = False
    target: str = ""
    """The name of the mirror's target that has it; "" if the disk has it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where bitmaps are: a disk, or the target of its mirror, by its node name."""

    disk: Disk
    target: str = ""


@dataclass(slots=True)
class _Moment:
    """What the commits of one transaction do at its end, so that a guest's change between two of
    them is in one of the bitmaps at least."""

    stopped: dict[NamedBitmap, Disk] = field(default_factory=dict)
    """These do not record any more; until the end they do."""
    removed: dict[NamedBitmap, Disk] = field(default_factory=dict)
    merged: dict[DirtyBitmap, list[DirtyBitmap]] = field(default_factory=dict)
    """What each source of a merge was merged into."""
    seen: dict[DirtyBitmap, DirtyBitmap] = field(default_factory=dict)
    """What each source had then, or has got from another one since: no more is made clean."""

    def merge(self, source: DirtyBitmap, into: DirtyBitmap) -> None:
        self.merged.pop(into, None)  # it is dirty for another reason from now on
        if source not in self.seen:
            self.seen[source] = source.copy()
        if into in self.seen:
            self.seen[into].merge(self.seen[source])
        self.merged.setdefault(source, []).append(into)
        into.merge(source)

    def clear(self, bitmap: DirtyBitmap) -> None:
        if (seen := self.seen.pop(bitmap, None)) is not None:
            bitmap.subtract(seen)
        else:
            bitmap.clear_all()


class Bitmaps:
    """The bitmaps of all disks. A change that is not possible raises CommandError with QEMU's text,
    and changes nothing."""

    def __init__(self, stores: Mapping[Disk, StateStore]) -> None:
        """`stores`: where the state of each disk is saved."""
        self._stores = stores
        self._of: dict[Disk, dict[str, NamedBitmap]] = {}
        self._moment: _Moment | None = None

    @contextmanager
    def one_moment(self) -> Iterator[None]:
        """All commits within this are those of one transaction. As in QEMU a guest's change comes
        before all of them or after them; here it may count as both."""
        moment = self._moment = _Moment()
        try:
            yield
        finally:
            self._moment = None
            self._end(moment)

    def _end(self, moment: _Moment) -> None:
        over = moment.stopped | moment.removed
        for bitmap, disk in over.items():
            disk.ledger.detach(bitmap.bitmap)
        for bitmap in over:
            for into in moment.merged.get(bitmap.bitmap, ()):
                into.merge(bitmap.bitmap)
        for bitmap, disk in moment.stopped.items():
            self._keep(disk, bitmap)
        for bitmap, disk in moment.removed.items():
            self._drop(disk, bitmap)

    def take_up(self, disk: Disk, found: RecoveredState) -> None:
        """Continue the persistent bitmaps of an earlier process."""
        for record in found.definition.bitmaps:
            bitmap = self._stores[disk].new_bitmap(record.key)(disk.size, record.granularity)
            found.restore(bitmap, record.key)
            self._add(disk, NamedBitmap(record.name, bitmap, record.is_recording, record.key))

    def of(self, place: Place) -> list[NamedBitmap]:
        """The bitmaps there, newest first."""
        there = self._of.get(place.disk, {}).values()
        return [bitmap for bitmap in reversed(there) if bitmap.target == place.target]

    def find(self, place: Place, name: str) -> NamedBitmap:
        """The bitmap `name` there. Raises CommandError."""
        bitmap = self._of.get(place.disk, {}).get(name)
        if bitmap is None or bitmap.target != place.target:
            raise CommandError(f"Dirty bitmap '{name}' not found")
        return bitmap

    def find_idle(self, place: Place, name: str) -> NamedBitmap:
        """The bitmap `name` there, if no job uses it. Raises CommandError."""
        bitmap = self.find(place, name)
        if bitmap.is_busy:
            raise CommandError(
                f"Bitmap '{name}' is currently in use by another operation and cannot be used"
            )
        return bitmap

    def add(
        self, place: Place, name: str, granularity: int | None, *, persistent: bool, disabled: bool
    ) -> Change:
        """Create a bitmap; `granularity` in bytes, None for the default. A name is used only once
        on a disk and its mirror's target."""
        disk = place.disk
        if not name:
            raise CommandError("Bitmap name cannot be empty")
        if len(name.encode()) > NAME_BYTES_MAX:
            raise CommandError(f"Bitmap name too long: {name}")
        granularity = GRANULARITY_DEFAULT if granularity is None else granularity
        if granularity < 512 or granularity & (granularity - 1):
            raise CommandError("Granularity must be power of 2 and at least 512")
        if name in self._of.get(disk, {}):
            raise CommandError(f"Bitmap already exists: {name}")
        if sum(map(len, self._of.values())) >= BITMAPS_MAX:
            raise CommandError(f"There are {BITMAPS_MAX} bitmaps already; remove some")
        self._check_bytes(disk.size, granularity)
        store, key = self._stores[disk], f"bitmap-{uuid.uuid4().hex}" if persistent else ""
        if persistent and (place.target or not store.is_lasting):
            raise CommandError(
                f"Can't store persistent bitmaps to {place.target or disk.name}: "
                f"Operation not supported"
            )
        make = store.new_bitmap(key) if persistent else DirtyBitmap
        bitmap = NamedBitmap(
            name, make(disk.size, granularity), not disabled, key, target=place.target
        )
        self._add(disk, bitmap)
        return Change(lambda: self._drop(disk, bitmap))

    def target_released(self, place: Place, *, is_pivoted: bool) -> None:
        """The mirror to that target has ended: after a pivot its bitmaps belong to the disk, else
        they are removed."""
        for bitmap in self.of(place):
            if is_pivoted:
                bitmap.target = ""
            else:
                self._drop(place.disk, bitmap)

    def remove(self, place: Place, name: str) -> Change:
        """Remove at the commit; until then the name is in use, as in QEMU."""
        bitmap = self.find_idle(place, name)
        bitmap.is_busy = True

        def undo() -> None:
            bitmap.is_busy = False

        def commit() -> None:
            if self._moment is None:
                self._drop(place.disk, bitmap)
            else:
                self._moment.removed[bitmap] = place.disk

        return Change(undo, commit)

    def clear(self, place: Place, name: str) -> Change:
        """Make a bitmap clean."""
        bitmap = self.find_idle(place, name).bitmap

        def commit() -> None:
            if self._moment is None:
                bitmap.clear_all()
            else:
                self._moment.clear(bitmap)

        return Change(_nothing, commit)

    def record(self, place: Place, name: str, recording: bool) -> Change:
        """block-dirty-bitmap-enable and -disable."""
        bitmap = self.find_idle(place, name)
        return Change(_nothing, lambda: self._set_recording(place.disk, bitmap, recording))

    def merge(self, place: Place, target: str, sources: list[tuple[Place, str]]) -> Change:
        """Mark in `target` what is dirty in any of `sources`."""
        into = self.find_idle(place, target).bitmap
        found = [self.find_idle(*source).bitmap for source in sources]
        for bitmap in found:
            if bitmap.size != into.size:
                raise CommandError(
                    f"Bitmaps are of different sizes (destination size is {into.size}, source "
                    f"size is {bitmap.size}) and can't be merged"
                )

        def commit() -> None:
            for bitmap in found:
                if self._moment is None:
                    into.merge(bitmap)
                else:
                    self._moment.merge(bitmap, into)

        return Change(_nothing, commit)

    def _check_bytes(self, size: int, granularity: int) -> None:
        """Raise CommandError unless there is room for another bitmap of this kind."""
        check_bits(size, granularity)
        there = [b.bitmap for named in self._of.values() for b in named.values()]
        taken = sum(bytes_of(b.size, b.granularity) for b in there)
        if taken + bytes_of(size, granularity) > BYTES_MAX:
            raise CommandError(
                f"Bitmaps may take {BYTES_MAX >> 20} MiB together: remove some, or give a larger "
                f"granularity"
            )

    def _add(self, disk: Disk, bitmap: NamedBitmap) -> None:
        self._of.setdefault(disk, {})[bitmap.name] = bitmap
        if bitmap.is_recording:
            disk.ledger.attach(bitmap.bitmap)
        self._keep(disk, bitmap)

    def _drop(self, disk: Disk, bitmap: NamedBitmap) -> None:
        del self._of[disk][bitmap.name]
        disk.ledger.detach(bitmap.bitmap)
        self._stores[disk].drop_bitmap(bitmap.key)
        bitmap.bitmap.close()

    def _keep(self, disk: Disk, bitmap: NamedBitmap) -> None:
        if bitmap.key:
            record = BitmapRecord(
                bitmap.name, bitmap.bitmap.granularity, bitmap.is_recording, bitmap.key
            )
            self._stores[disk].keep_bitmap(record, bitmap.bitmap)

    def _set_recording(self, disk: Disk, bitmap: NamedBitmap, recording: bool) -> None:
        if recording == bitmap.is_recording:
            return
        bitmap.is_recording = recording
        if recording:
            if self._moment is None or self._moment.stopped.pop(bitmap, None) is None:
                disk.ledger.attach(bitmap.bitmap)
        elif self._moment is not None:
            self._moment.stopped[bitmap] = disk
            return
        else:
            disk.ledger.detach(bitmap.bitmap)
        self._keep(disk, bitmap)
