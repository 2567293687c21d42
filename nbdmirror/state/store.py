"""Store: saves state in a state directory while the server runs.

A disk's DiskStore saves each change of its mirror and bitmaps (`keep_mirror`, `keep_bitmap` and the
like). Their dirty bits are saved every few seconds while they change (checkpoint.py); the journal
covers the time in between. A mirror's end is recorded *before* it is reported: a mirror that was
reported as ended must not continue at the next start, when its target may be in use.

`Writer` has the thread that writes, in the order of the calls; everything else happens on the event
loop's thread. If the state directory fails, this is reported, the write is repeated, and no guest's
I/O ends. StateStore (null_store.py) documents the methods.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

from nbdmirror.devices.base import Done
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.changes import MayDiffer
from nbdmirror.disk.ledger import Ledger
from nbdmirror.errors import IO_ERRORS
from nbdmirror.state.bitmap_snapshot import BitmapSnapshot
from nbdmirror.state.checkpoint import Bits, Checkpoints
from nbdmirror.state.disk_file import DiskIdentity, mtime_ns
from nbdmirror.state.disk_record import BitmapRecord, DiskRecord, MirrorRecord
from nbdmirror.state.heartbeat import Heartbeat
from nbdmirror.state.journal import Regions
from nbdmirror.state.null_store import FORGET_S_MAX, NewBitmap, StateStore, done_future
from nbdmirror.state.pivots import note_end
from nbdmirror.state.process_memory import ProcessMemory
from nbdmirror.state.recent import ShmRemainder
from nbdmirror.state.record_files import Ending, RecordFiles
from nbdmirror.state.recovery import PivotRecord, RecoveredState, names
from nbdmirror.state.sealed_files import Folder, Slots
from nbdmirror.state.shared_memory import discard_left
from nbdmirror.state.spill import SpillFile
from nbdmirror.state.writer import Writer
from nbdmirror.subject_log import disk_log

CHECKPOINT_S = 5.0
"""Interval at which dirty bits are saved. After a power cut regions that were written within two
intervals are copied again."""

RETRY_S = 1.0
"""Pause before a failed write is repeated."""


@dataclass(frozen=True, slots=True)
class _Mirror:
    record: MirrorRecord
    changes: Mapping[str, MayDiffer]
    """By the keys in the record."""


class DiskStore(StateStore):
    """The store of one disk. `found`: the state that an earlier process left. `pivoted`: the record
    of a pivot. `is_target_only`: this is the old side, and the saved state stays as it is."""

    is_lasting = True

    def __init__(
        self,
        *,
        name: str,
        identity: DiskIdentity,
        folder: Folder,
        slots: Slots,
        found: RecoveredState | None,
        pivoted: PivotRecord | None,
        is_target_only: bool = False,
    ) -> None:
        self.name = name
        self.found = found
        self._identity = identity
        self._pivoted = None if is_target_only else pivoted
        self.truth = pivoted.truth if pivoted is not None and is_target_only else ""
        """For a target only: the URI that the disk is served from."""
        self.folder = folder
        self._slots = slots
        self.files = names(name)
        self._disk_id = found.definition.disk_id if found else uuid.uuid4().hex
        self._memory = ProcessMemory(name)
        self.journal = self._memory.journal
        self._mirror: _Mirror | None = None
        self._bitmaps: dict[str, tuple[BitmapRecord, DirtyBitmap]] = {}
        self._records = RecordFiles(folder, self.files)
        self._ending: Ending | None = None
        """None as well if something else was saved since it was prepared."""
        self._is_committing = False
        self._ended: tuple[_Mirror | None, PivotRecord | None, DiskIdentity] | None = None
        """The state before the last end, while that may be undone."""
        self._is_pivot_in_doubt = False
        """NAME.pivoted may be wrong."""
        self.is_left = True
        """No client had the disk open when the server was asked to end."""
        self._saves: Future[None] = done_future()
        self._is_suspended = False
        self._since: DirtyBitmap | None = None

    @property
    def identity(self) -> DiskIdentity:
        """The disk's source and size."""
        return self._identity

    @property
    def heartbeat(self) -> Heartbeat | None:
        """None before `begin`, and without memory that outlives the process."""
        return self._memory.heartbeat

    # The start.

    def begin(self, writer: Writer, flush: Callable[[], None]) -> None:
        """Begin, after nbdkit has forked and before guests connect. `flush` makes guests' writes
        durable. Raises OSError."""
        self._writer = writer
        self._pivoted = note_end(self.folder, self.name, self._pivoted, has_ended=False)
        self._memory.begin(self._disk_id, writer)
        if self.heartbeat is not None:  # before the first beat a later disk may be refused
            self.heartbeat.check(self._identity.source)
        self.journal = self._memory.journal
        found = self.found
        if found is not None and found.problem:
            disk_log(self.name).error("its state: %s; everything counts as dirty", found.problem)
            self._put_aside(found)
        self._regions = Regions(
            disk_id=self._disk_id,
            size=self._identity.size,
            slots=self._slots,
            clock=writer.clock,
            on_error=writer.failed,
            log=found.log if found else None,
            is_anywhere=found is not None and not found.problem and found.is_log_needed,
        )
        self._regions.start()
        self._checkpoints = Checkpoints(
            journal=self.journal,
            regions=self._regions,
            writer=writer,
            bits=self._bits,
            write=self._write_bits,
            flush=partial(self._flush, flush),
            is_at_rest=self._is_at_rest,
        )

    def _flush(self, flush: Callable[[], None]) -> None:
        try:
            flush()
        except IO_ERRORS:
            self._memory.flush_failed()
            raise

    def begun(self) -> None:
        """Everything that was found is in use again, or given up: save that, and wait. Before this
        returns no guest may write, since the earlier process's memory still counts. Not on the
        loop's thread. Raises OSError."""
        if self.found is not None and self.found.definition.clean_mtime_ns is not None:
            # Not before: until now the start may be refused, and the disk be changed after that.
            self._records.write(replace(self.found.definition, clean_mtime_ns=None))
        before, self.found = self.found, None
        if before is not None:
            self._save()
            self._saves.exception()  # reported already
            discard_left(self._disk_id, before.definition.memory, but=self._memory.folder)

    def _put_aside(self, found: RecoveredState) -> None:
        """Put unusable files aside first: with a new log of intents the next start trusts them."""
        for name in found.refused:
            self.folder.refuse(name)
        self.folder.commit([], [self.files["bitmaps"]])

    def start(self) -> None:
        """Start the timer. On the loop's thread; from now on guests may connect."""
        self._writer.call_later(CHECKPOINT_S, self._checkpoint)

    # What is kept.

    def new_bitmap(self, key: str) -> NewBitmap:
        return self._memory.new_bitmap(key)

    def remainder(self, key: str) -> ShmRemainder | None:
        return self._memory.remainder(key)

    def new_spill(self, size: int, call_soon: Callable[[Callable[[], None]], None]) -> SpillFile:
        return SpillFile(self.folder.path, size, call_soon, self._writer.no_spill)

    def note_point(self, number: int, time_ns: int) -> None:
        if not self._is_suspended:
            self._memory.newest_point = number, time_ns

    def keep_mirror(self, record: MirrorRecord, changes: Mapping[str, MayDiffer]) -> None:
        if not self._is_suspended:
            self._mirror = _Mirror(record, changes)
            self._save()

    def keep_bitmap(self, record: BitmapRecord, bitmap: DirtyBitmap) -> None:
        if not self._is_suspended:
            self._bitmaps[record.key] = (record, bitmap)
            self._save()

    def drop_bitmap(self, key: str) -> None:
        if not self._is_suspended and self._bitmaps.pop(key, None) is not None:
            self._save()

    def saved(self) -> Future[None]:
        return self._saves

    @property
    def _is_needed(self) -> bool:
        """Whether guests write to the log of intents. A request that is held while an end may be
        undone has done so when it goes on."""
        return self._mirror is not None or bool(self._bitmaps) or self._ended is not None

    def _definition(self, *, has_mirror: bool = True) -> DiskRecord | None:
        """The content for NAME.json; None if there is no mirror and no bitmap."""
        mirror = self._mirror.record if self._mirror and has_mirror else None
        if mirror is None and not self._bitmaps:
            return None
        return DiskRecord(
            disk_id=self._disk_id,
            identity=self._identity,
            memory=self._memory.path,
            mirror=mirror,
            bitmaps=tuple(record for record, _ in self._bitmaps.values()),
        )

    def _save(self) -> None:
        """Save the definition, and repeat until that succeeds."""
        if self.found is not None:
            return  # not yet: a part of the found state may not be in use again
        self._ending = None  # it is out of date, and its file is used now
        if self._is_needed and self.journal.regions is None:
            self._checkpoints.begin_anew()
        self.journal.regions = self._regions if self._is_needed else None
        # This comes after an end that is being recorded. If that fails, the end is undone.
        save = self._saving(self._definition(has_mirror=not self._is_committing))

        def done(error: BaseException | None) -> None:
            if self._saves is not saves:
                return  # a newer save exists
            if error is None:
                self._is_pivot_in_doubt = False
            elif not self._is_suspended:
                self._writer.call_later(RETRY_S, self._save)

        saves = self._saves = self._writer.submit(save)
        self._writer.then(saves, done)

    def _saving(self, definition: DiskRecord | None) -> Callable[[], None]:
        if self._is_pivot_in_doubt:
            return partial(self._records.write_both, definition, self._pivoted)
        return partial(self._records.write, definition)

    def _when_saved(self, done: Done) -> None:
        """Call `done` when the last save has ended, or after FORGET_S_MAX."""
        calls = [done]

        def once(error: BaseException | None = None) -> None:
            if calls:
                calls.pop()(None)

        self._writer.call_later(FORGET_S_MAX, once)
        self._writer.then(self._saves, once)

    # A mirror's end.

    def prepare_end(self, pivot_to: str, done: Done) -> None:
        definition, before, left = self._definition(has_mirror=False), self._pivoted, self._identity
        if pivot_to and definition is not None:
            definition = replace(definition, identity=DiskIdentity(pivot_to, left.size))
        ending = self._ending = Ending(definition)

        def prepare() -> None:  # all of it on the writer's thread: `after` queries files
            if pivot_to:
                now_s = self._writer.clock()
                ending.pivoted = PivotRecord.after(before, left, pivot_to, now_s)
            self._records.prepare(definition, ending.pivoted)

        def prepared(error: BaseException | None) -> None:
            ending.is_prepared = error is None
            done(error)

        self._writer.then(self._writer.submit(prepare), prepared)

    def commit_end(self, done: Done) -> None:
        ending, self._ending = self._ending, None
        if ending is None or not ending.is_prepared:
            done(OSError(0, "the state has changed in the meantime"))
            return
        pivoted, self._is_committing = ending.pivoted, True

        def committed(error: BaseException | None) -> None:
            self._is_committing = False
            self._ended = (self._mirror, self._pivoted, self._identity)
            self._mirror = None
            if pivoted is not None:
                self._pivoted = pivoted
                self._identity = DiskIdentity(pivoted.truth, self._identity.size)
            if error is not None:  # a part may have been done
                self.undo_end(lambda _: done(error))
            else:
                done(None)

        call = partial(self._records.commit, ending.definition, pivoted)
        self._writer.then(self._writer.submit(call), committed)

    def undo_end(self, done: Done) -> None:
        if self._ended is not None:
            self._mirror, self._pivoted, self._identity = self._ended
            self._ended = None
            self._is_pivot_in_doubt = True
            self._checkpoints.begin_anew()  # the saved bits may have gone with the record
            self._save()
        self._when_saved(done)

    def end_is_final(self) -> None:
        self._ended = None
        if not self._is_needed:
            self.journal.regions = None

    def forget_mirror(self, done: Done) -> None:
        if self._is_suspended:
            done(None)
            return
        self._mirror = None
        self._save()
        self._when_saved(done)

    # What is dirty.

    def _checkpoint(self) -> None:
        self._writer.call_later(CHECKPOINT_S, self._checkpoint)
        if self._is_needed and not self._is_suspended:
            self._checkpoints.tick()

    def bits_saved(self) -> Future[None]:
        return self._checkpoints.make()

    def _is_at_rest(self) -> bool:
        if self._mirror is None or self._bitmaps:
            return False
        return all(changes.is_at_rest for changes in self._mirror.changes.values())

    def _write_bits(self, bits: Bits) -> None:
        name = self.files["bitmaps"]
        changed_ns = mtime_ns(self._identity.source)
        point = self._memory.newest_point
        saved = BitmapSnapshot(self._disk_id, self._writer.clock(), bits, changed_ns, *point)
        self.folder.prepare(name, saved.to_bytes())
        self.folder.commit([name])

    def _bits(self) -> Bits:
        bits = {key: bitmap.to_bytes() for key, (_, bitmap) in self._bitmaps.items()}
        for key, changes in self._mirror.changes.items() if self._mirror is not None else ():
            dirty = changes.may_differ()
            if self._since is not None:
                dirty.merge(self._since)
            bits[key] = dirty.to_bytes()
        return bits

    # The end.

    def suspend(self, ledger: Ledger) -> None:
        """The process ends: the saved state stays as it is, whatever happens to jobs from here on.
        Guests' later writes are marked as dirty."""
        if self._is_suspended:
            return
        self._is_suspended = True
        self._memory.keep()
        if self._mirror is not None:
            record = self._mirror.record
            self._since = self.new_bitmap(record.key)(self._identity.size, record.granularity)
            ledger.attach(self._since)

    def finish(self, *, is_flushed: bool) -> None:
        """Save the final state, after the last guest, and after the disk was flushed, if that has
        succeeded, and closed. For any thread but the loop's. The next start recovers as after a
        kill if this raises OSError, if the disk is not flushed, or if a guest's request has not
        ended: it may change the disk yet."""
        definition = self._definition()
        is_clean = is_flushed and not self.journal.under_way()
        if definition is not None and is_clean:
            self._write_bits(self._bits())
            clean = mtime_ns(self._identity.source)
            definition = replace(definition, memory="", clean_mtime_ns=clean)
        if definition is not None or self._saves.exception() is not None:
            self._saving(definition)()
        if self.is_left and not self._is_pivot_in_doubt:
            note_end(self.folder, self.name, self._pivoted, has_ended=True)
        if definition is None or is_clean:
            self._memory.discard()
        elif not is_flushed:
            self._memory.flush_failed()
        self._regions.close()
