"""Recovery: the saved state of one disk, and how far it can be trusted.

    NAME.json      the disk, its mirror and its persistent bitmaps: which ones exist
    NAME.bitmaps   what was dirty in them at the last save
    NAME.intents   where guests may have written since (intent_log.IntentLog)
    NAME.pivoted   after a pivot: which side is the disk, and which sides are not any more

Memory that outlives the process (shared_memory.ShmDirectory) has the bitmaps themselves and the
requests in flight. This module writes nothing: `recover` reads once, at the start.

Trust, best first: after an orderly end NAME.bitmaps is exact. After a kill the memory is exact,
unless the storage may have lost what was not flushed: then NAME.intents has at least where.
After a power cut NAME.bitmaps and NAME.intents together have at least everything that is dirty. If
another program wrote to the disk, or a needed file is damaged, everything is dirty.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Self

from nbdmirror.disk.bitmap import DirtyBitmap, bytes_of
from nbdmirror.disk.claim import Range
from nbdmirror.disk.tracker import Tracker
from nbdmirror.identity import Same, same_place
from nbdmirror.nbd_uri import is_uri
from nbdmirror.state.bitmap_snapshot import BitmapSnapshot
from nbdmirror.state.disk_file import (
    DiskIdentity,
    LastSeen,
    check_unchanged,
    check_unchanged_since_killed,
    check_unchanged_since_saved,
)
from nbdmirror.state.disk_record import DiskRecord
from nbdmirror.state.intent_log import IntentLog, check_newer, slot_bytes
from nbdmirror.state.journal import is_untouched, ranges_left
from nbdmirror.state.json_record import (
    COUNT,
    FLAG,
    NUMBER,
    TEXT,
    Key,
    ListOf,
    Object,
    load,
    write,
)
from nbdmirror.state.recent import parts_left
from nbdmirror.state.sealed_files import Folder, StateError, UnknownFormat, seal, unseal
from nbdmirror.state.shared_memory import ShmDirectory

KIND_PIVOTED = "pivoted"

RECORD_ID_LENGTH = 8

OTHER_VERSION = "start the nbdmirror that wrote it, or a newer one"
"""The advice for UnknownFormat."""

JOURNAL = "journal"
RECENT = "recent"
ALIVE = "alive"
NEWEST_POINT, NEWEST_POINT_TIME = "newest-point", "newest-point-time"
"""Files of memory: the requests in progress; the last ones; when the process was last alive
(LastSeen); the number of the mirror's last committed point, in NUMBER_BYTES."""

FLUSH_FAILED = "flush-failed"
"""A file of memory that exists if a flush of the disk has failed."""

NUMBER_BYTES = 8


@dataclass(frozen=True, slots=True)
class PivotRecord:
    """NAME.pivoted."""

    truth: Annotated[str, Key("truth", TEXT)]
    """The URI of the export that the disk is served from."""
    left: Annotated[tuple[DiskIdentity, ...], Key("left", ListOf(Object(DiskIdentity)))]
    """Its former sources: not the disk any more."""
    time_s: Annotated[float, Key("time_s", NUMBER)]
    size: Annotated[int, Key("size", COUNT)] = 0
    """The disk's size, which a larger target does not change; 0 in records of older versions."""
    has_ended: Annotated[bool, Key("has_ended", FLAG)] = False
    """A server of the new side has ended in order since, without clients. Otherwise a guest may
    come back to the new side."""

    @classmethod
    def after(
        cls, before: PivotRecord | None, left: DiskIdentity, truth: str, time_s: float
    ) -> Self:
        """The record of a pivot from `left` to `truth`, which may be a former source."""
        sides = (*(before.left if before else ()), left, *left.files_below())
        kept = tuple(side for side in sides if same_place(side.source, truth) is not Same.YES)
        return cls(truth, kept, time_s, left.size)

    def is_left(self, side: DiskIdentity) -> bool:
        """Whether `side` is not the disk any more."""
        return any(left.is_same(side) for left in self.left)

    def has_left(self, side: DiskIdentity, source: str) -> bool:
        """Whether `source` is the disk now, and `side` was the disk before."""
        is_truth = same_place(source, self.truth) is Same.YES
        return is_truth and self.is_left(side)

    def to_bytes(self) -> bytes:
        said = write(self)
        if not self.has_ended:
            del said["has_ended"]  # as older versions write it, so with the same ID
        for side in said["left"]:
            if not side["birth_ns"]:
                del side["birth_ns"]  # the same
        return seal(KIND_PIVOTED, json.dumps(said, indent=1).encode())

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises StateError."""
        return load(cls, unseal(KIND_PIVOTED, content))


def record_id(content: bytes) -> str:
    """The ID of one record of a pivot, sound or damaged, independent of `has_ended`. The record of
    a later pivot has another ID."""
    with suppress(StateError):
        pivoted = PivotRecord.from_bytes(content)
        if pivoted.has_ended:
            content = replace(pivoted, has_ended=False).to_bytes()
    return hashlib.sha256(content).hexdigest()[:RECORD_ID_LENGTH]


@dataclass(slots=True)
class RecoveredState:
    """The state of a disk that an earlier process has left."""

    definition: DiskRecord
    problem: str = ""
    """Why the saved dirty bits cannot be trusted; then everything is dirty."""
    log: IntentLog | None = None
    is_log_needed: bool = False
    """Without the log, guests may have written anywhere since the bitmaps were saved."""
    bits: dict[str, list[bytes]] = field(default_factory=dict)
    ranges: list[Range] = field(default_factory=list)
    """What is dirty in every bitmap."""
    parts: list[Range] | None = None
    """What may differ of the mirror's source and target's storage, and no more; None if only the
    bitmaps tell."""
    newest_point: int = 0
    """The mirror had committed this point, or a later one; 0: it is not known to have any."""
    newest_point_ns: int = 0
    """The wall time of that point; 0: not known."""
    refused: list[str] = field(default_factory=list)
    """Files that cannot be used, to be put aside."""

    def restore_mirror(self, tracker: Tracker, key: str) -> None:
        """Mark in a new tracker what may differ between the source and the target's storage."""
        if self.problem or self.parts is None:
            self.restore(tracker.dirty, key)
        else:
            tracker.begin_with(self.parts)

    def restore(self, bitmap: DirtyBitmap, key: str) -> None:
        """Mark in a clean bitmap what may be dirty in the saved bitmap `key`."""
        contents = self.bits.get(key)
        if self.problem or contents is None:
            bitmap.mark_all()
            return
        try:
            for bits in contents:
                bitmap.merge_bytes(bits)
        except ValueError:
            bitmap.mark_all()
        for offset, length in self.ranges:
            bitmap.mark(offset, length)


def remainder_name(key: str) -> str:
    """The file of memory with the remainder of the mirror `key`."""
    return f"remainder-{key}"


def names(disk: str) -> dict[str, str]:
    """The files of a disk: definition, bitmaps, intents, pivoted, last."""
    return {
        "definition": f"{disk}.json",
        "bitmaps": f"{disk}.bitmaps",
        "intents": f"{disk}.intents",
        "pivoted": f"{disk}.pivoted",
        "last": f"{disk}.last",
    }


def recover(
    folder: Folder, name: str, identity: DiskIdentity, pivoted: PivotRecord | None = None
) -> RecoveredState | None:
    """The saved state of the disk `name`, which is `identity` now, after the pivot `pivoted` if
    there was one; None if nothing is saved. Raises StateError if the definition is damaged or
    belongs to another disk: `str(error)` begins with the file's name. Raises OSError."""
    files = names(name)
    content = folder.read(files["definition"])
    if content is None:
        return None
    try:
        definition = DiskRecord.from_bytes(content)
    except StateError as error:
        raise StateError(f"{files['definition']}: {error}") from error
    if pivoted is not None and pivoted.has_left(definition.identity, identity.source):
        # The record of the pivot is written first; the server was killed before the rest was.
        definition = replace(definition, identity=identity, mirror=None)
    before = definition.identity
    if not before.is_same(identity):
        raise OtherDisk(f"{files['definition']}: is of {before.source}, not of {identity.source}")
    found = RecoveredState(replace(definition, identity=identity))  # the path may have changed
    if before.size != identity.size:
        found.problem = f"the disk had {before.size} bytes, and has {identity.size} now"
        if identity.size < before.size:
            found.problem += ", so its end is missing"
    elif before.is_one_file(identity) is False:  # only the name is the same
        found.problem = "another file is there now"
    else:
        _load_trusted(folder, files, found)
    return found


def check_formats(folder: Folder, name: str) -> None:
    """Raise UnknownFormat if this nbdmirror cannot read a file of the disk `name` that another one
    may read: `str(error)` begins with the file's name, and says what to do. Damaged files are
    ignored here. Raises OSError."""
    all_dirty = "everything counts as dirty"
    readers: dict[str, tuple[Callable[[bytes], object], str]] = {
        "definition": (DiskRecord.from_bytes, "the disk has no mirror and no bitmaps"),
        "bitmaps": (partial(BitmapSnapshot.from_bytes, sizes={}), all_dirty),
        "intents": (check_newer, all_dirty),
    }
    for which, (read, loss) in readers.items():
        file = names(name)[which]
        try:
            read(folder.read(file) or b"")
        except UnknownFormat as error:
            text = f"{file}: {error}; {OTHER_VERSION}, or move this file away: then {loss}"
            raise UnknownFormat(text) from error
        except StateError:
            pass


def last_size(folder: Folder, name: str, source: str) -> int:
    """The size, in bytes, of the disk `name` when it was last served from `source`; 0 if not known.
    Raises OSError."""
    try:
        identity = DiskRecord.from_bytes(folder.read(names(name)["definition"]) or b"").identity
    except StateError:
        return 0
    return identity.size if same_place(identity.source, source) is Same.YES else 0


class OtherDisk(StateError):
    """The state under this name belongs to another disk."""


def _load_trusted(folder: Folder, files: dict[str, str], found: RecoveredState) -> None:
    """Fill `found` with the best state that can be trusted, or with the reason why there is
    none."""
    definition = found.definition
    source = definition.identity.source
    sizes = _sizes(definition)
    memory = ShmDirectory.find(definition.memory) if definition.clean_mtime_ns is None else None
    try:
        last = LastSeen.from_bytes(memory.read(ALIVE) or b"") if memory is not None else None
        if memory is not None and last is not None:
            requests = memory.read(JOURNAL) or b""
            check_unchanged_since_killed(source, last, was_idle=is_untouched(requests))
            # The log of intents stays on disk until the bitmaps have been saved again.
            found.is_log_needed = True
            with suppress(StateError):
                found.log = _log(folder, files, definition)
            if sizes and (is_uri(source) or memory.read(FLUSH_FAILED) is not None):
                found.ranges += _unflushed(folder, files, found, sizes)
            _take_from_memory(memory, found, sizes)
            return
        saved = _saved(folder, files, found, sizes)
        found.bits = {key: [bits] for key, bits in saved.bits.items()}
        found.newest_point, found.newest_point_ns = saved.newest_point, saved.newest_point_ns
        if definition.clean_mtime_ns is not None:
            check_unchanged(source, definition.clean_mtime_ns)
            return
        found.log = log = _log(folder, files, definition)
        check_unchanged_since_saved(source, max(saved.time_s, log.time_s), saved.mtime_ns)
        found.ranges = list(log.ranges())
    except StateError as error:
        found.problem = str(error)
    _check_sizes(found, sizes)


def _unflushed(
    folder: Folder, files: dict[str, str], found: RecoveredState, sizes: dict[str, int]
) -> list[Range]:
    """Where the disk may have lost what guests wrote, although this host lives: its NBD server may
    have ended as well, or a flush has failed. Raises StateError if that is not known: the log of
    intents has it from the first save on."""
    if sizes.keys().isdisjoint(_saved(folder, files, found, sizes).bits):
        raise StateError(f"{files['bitmaps']}: is older than the mirror and the bitmaps")
    return list(_log(folder, files, found.definition).ranges())


def _take_from_memory(memory: ShmDirectory, found: RecoveredState, sizes: dict[str, int]) -> None:
    found.bits = {key: memory.bits_of(key) for key in sizes}
    found.ranges += ranges_left(memory.read(JOURNAL) or b"")
    found.newest_point, found.newest_point_ns = (
        int.from_bytes(memory.read(name) or b"", sys.byteorder)
        for name in (NEWEST_POINT, NEWEST_POINT_TIME)
    )
    if (mirror := found.definition.mirror) is not None:
        remainder = memory.read(remainder_name(mirror.key)) or b""
        recent = memory.read(RECENT) or b""
        size = found.definition.identity.size
        found.parts = parts_left(remainder, recent, found.ranges, size)
    _check_sizes(found, sizes)


def _check_sizes(found: RecoveredState, sizes: dict[str, int]) -> None:
    for key, contents in found.bits.items():
        if not contents or any(len(bits) != sizes[key] for bits in contents):
            found.problem = found.problem or "the bitmaps have another size"


def _saved(
    folder: Folder, files: dict[str, str], found: RecoveredState, sizes: dict[str, int]
) -> BitmapSnapshot:
    content = folder.read(files["bitmaps"])
    if content is None:
        raise StateError(f"{files['bitmaps']}: is missing")
    try:
        saved = BitmapSnapshot.from_bytes(content, sizes)
        if saved.disk_id != found.definition.disk_id:
            raise StateError("belongs to another disk")
    except StateError as error:
        found.refused.append(files["bitmaps"])
        raise StateError(f"{files['bitmaps']}: {error}") from error
    return saved


def _log(folder: Folder, files: dict[str, str], definition: DiskRecord) -> IntentLog:
    size = definition.identity.size
    slots = folder.slots(files["intents"], slot_bytes(size), 2)
    try:
        return IntentLog.read(slots, disk_id=definition.disk_id, size=size)
    except StateError as error:
        raise StateError(f"{files['intents']}: {error}") from error
    finally:
        slots.close()


def _sizes(definition: DiskRecord) -> dict[str, int]:
    mirror = definition.mirror
    records: Iterable[Any] = (*definition.bitmaps, mirror, mirror.points if mirror else None)
    size = definition.identity.size
    return {r.key: bytes_of(size, r.granularity) for r in records if r is not None}
