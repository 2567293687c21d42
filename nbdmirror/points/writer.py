"""JournalWriter: appends points to a journal. On the event loop's thread.

The life of a point:

    begin       checks that the point fits; writes nothing
    put         ranges of the disk: data goes to the ring, beside it an index
    commit      index and header -> flush -> footer, durable: the point is there

or, at any time before its footer is sent, `give_up`: what was written is no point, and its place in
the ring is used again. The next point must then hold the whole content of the one that was given
up: what of it reached the journal is of no use.

Rules, each with a mutant in tests/model/pointmutants.py:

1. A footer is sent only after each write of its batch was acknowledged and a later flush has
   ended well. A batch with a failed write is never committed. Nor is one beside which a durable
   write of a superblock has failed: an export tells once that it has lost something, and may have
   told it there. So none of these is in flight beside the flush and the footer.
2. A batch names the digest of the batch before it; the first one names the base's.
3. A batch is written only to places that no batch of the chain has: free space begins behind the
   superblock's `tail`, which moves when the image holds those points (applier.py), and after the
   space was trimmed.
4. A batch begins when nothing of an earlier one is in flight any more: a late write would hit it.
5. The journal's owner is checked before each footer, so that a source that comes back after a
   recovery adds nothing.

After a lost connection the outcome of a commit is unknown: a new writer must be opened
(`take_over`), which finds out. A writer with a failed commit refuses to begin.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from nbdmirror.devices.base import Buffer, Done, Run, all_of, pieces
from nbdmirror.errors import IO_ERRORS, DeviceError, DeviceLost
from nbdmirror.names import POINT_BYTES_MAX
from nbdmirror.points.batch import GATHER_BYTES, Batch
from nbdmirror.points.format import (
    BLOCK_BYTES,
    ENTRY_BYTES,
    ENTRY_BYTES_MAX,
    Header,
    JournalError,
    Point,
    State,
    batch_bytes_max,
    blocks,
    pack_data,
    pack_footer,
    pack_zeroes,
)
from nbdmirror.points.last_batch import LastBatch
from nbdmirror.points.requests import (
    Exports,
    Flush,
    Program,
    Request,
    Side,
    Trim,
    Write,
    start,
)
from nbdmirror.points.superblocks import JournalTaken, Superblocks

REQUEST_BYTES_MAX = 32 << 20
"""NBD's limit of a request to a server that announces none."""


class JournalFull(JournalError):
    """A point does not fit. Nothing was written; `missing_bytes` are needed beside what is free."""

    def __init__(self, message: str, missing_bytes: int) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


@dataclass(frozen=True, slots=True)
class Room:
    """How full a journal is, in bytes."""

    ring_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        return self.ring_bytes - self.used_bytes


class JournalWriter:
    """Appends points, one after the other, to the journal of a disk."""

    def __init__(
        self,
        exports: Exports,
        superblocks: Superblocks,
        *,
        headers: Sequence[Header],
    ) -> None:
        """`exports`: the journal, and the image beside it. `headers`: of the batches after the
        superblock's base, in order. `take_over` knows all these."""
        self.size = superblocks.current.disk_bytes
        self.headers = list(headers)
        """Of the batches that are committed and not freed, in order."""
        self.damage: tuple[str, ...] = ()
        """What was damaged when the journal was taken over, a line for each thing."""
        self._exports = exports
        self._export = exports[Side.JOURNAL]
        self.name = self._export.description
        self.export_bytes = self._export.size
        self.superblocks = superblocks
        base = superblocks.current
        self.newest = headers[-1].point if headers else base.base
        """The last point that is committed."""
        self.digest = headers[-1].digest if headers else base.base_digest
        """Of the last point's header, or of the base's."""
        self._head = headers[-1].end if headers else base.tail
        self._tail = base.tail
        self.last_batch = LastBatch()
        self._batch: Batch | None = None
        self._in_flight = 0
        self._committing = 0
        self._problem: JournalError | None = None
        self._on_idle: Done | None = None

    # Room.

    def room(self) -> Room:
        return Room(self.superblocks.current.ring_bytes, self._head - self._tail)

    def free(self) -> Program[None]:
        """Trim the batches before the superblock's tail, and use their space again. A failed trim
        is no error: the space was only not returned to its file system."""
        tail = self.superblocks.current.tail
        spans = self.superblocks.current.spans(self._tail, tail - self._tail)
        try:
            yield [Trim(Side.JOURNAL, offset, length) for offset, length in spans]
        except IO_ERRORS as error:
            if isinstance(error, DeviceLost):
                raise
        self._tail = tail
        self.headers = [header for header in self.headers if header.place >= tail]

    @property
    def is_busy(self) -> bool:
        """Writes of a point are in flight."""
        return self._in_flight > 0

    @property
    def is_idle(self) -> bool:
        """Nothing is in flight: no write, and no commit, which continues after its `done`."""
        return not self._in_flight and not self._committing

    # The image, before there is a point.

    def seed(self, since_ns: int) -> Program[None]:
        """Before the first write to the image that is not an `Applier`'s: from now on, wall time
        `since_ns`, there is no point, until one is committed. Points from before are gone."""
        assert not self.superblocks.current.applier, "an applier may be writing to the image"
        is_first = self.superblocks.current.state in (State.EMPTY, State.SEEDING)
        yield from self.superblocks.update(
            state=State.SEEDING if is_first else State.TORN,
            since_ns=since_ns,
            base=self.newest,
            base_digest=self.digest,
            is_base_offered=False,
            tail=self._head,
            applying=0,
            samples=(),
        )
        yield from self.free()

    # A point.

    def begin(self, time_ns: int, *, bytes_max: int, name: str = "", group: int = 0) -> Point:
        """Open the next point: the disk at wall time `time_ns`. `bytes_max`: the bytes that will be
        written and zeroed, at most; if they are in whole blocks and not more, the point fits.

        Raises JournalFull, JournalError if the journal cannot be written to any more, and
        ValueError for a name that is too long. Nothing is written in any case."""
        assert self._batch is None, "a point is open"
        assert not self._in_flight, "requests of an earlier point are in flight"
        if self._problem is not None:
            raise self._problem
        if len(name.encode()) > POINT_BYTES_MAX:
            raise ValueError(f"a point's name has at most {POINT_BYTES_MAX} bytes")
        needed, room = batch_bytes_max(bytes_max), self.room()
        if needed > room.free_bytes:
            text = (
                f"{self.name}: a point of up to {needed} bytes does not fit: "
                f"{room.free_bytes} of {room.ring_bytes} bytes are free"
            )
            raise JournalFull(text, needed - room.free_bytes)
        point = Point(self.newest.sequence + 1, time_ns, name, group)
        self._batch = Batch(point, self._head, self.superblocks.failure)
        self.last_batch.begins()
        return point

    def put(self, runs: Sequence[Run], done: Done) -> None:
        """Append ranges of the disk, in whole blocks but for its odd end. The data must stay as it
        is until `done`. Zeroes take an entry of the index alone. What is put twice in a point
        counts as it was put last."""
        batch = self._batch
        assert batch is not None, "no point is open"
        index: list[bytes] = []
        data: list[Buffer] = []
        place, size = batch.next, self.size
        for offset, length, content in runs:
            end = offset + length
            assert not offset % BLOCK_BYTES and length > 0, "not whole blocks"
            assert end == size or (end < size and not end % BLOCK_BYTES), "not whole blocks"
            if content is None:
                index.append(pack_zeroes(offset, length))
                continue
            if padding := -length % BLOCK_BYTES:
                content = memoryview(bytes(content) + bytes(padding))
            if length <= ENTRY_BYTES_MAX:
                index.append(pack_data(offset, length, place, zlib.crc32(content)))
            else:
                index += _entries_of(content, offset, end, place)
            data.append(content)
            place += len(content)
        length = place - batch.next
        if not self._has_room(batch, length, len(index) * ENTRY_BYTES):
            text = f"{self.name}: point {batch.point.sequence} does not fit"
            batch.error = DeviceError(text, errno.ENOSPC)
            done(batch.error)
            return
        batch.index += b"".join(index)
        if data:
            self._gather(batch, data, length, done)
        else:
            done(None)

    def commit(self, done: Done) -> None:
        """Make the open point last. All its writes were acknowledged. So were those of the image,
        if it was seeded for this point: it is flushed here. `done` without an error: from now on
        the far side has this point, whatever is lost.

        With an error the point is given up, or nobody knows: then `begin` raises until the journal
        was taken over again."""
        batch = self._batch
        assert batch is not None, "no point is open"
        assert not self._in_flight, "writes are in flight"
        self._batch = None
        is_told = False

        def tell(error: BaseException | None) -> None:
            nonlocal is_told
            if not is_told:
                is_told = True
                done(error)

        def ended(_: None, error: BaseException | None) -> None:
            self._committing -= 1
            if isinstance(error, JournalTaken):
                self._problem = error
            elif error is not None and is_told:  # of the superblock, after the commit
                self._problem = JournalError(
                    f"{self.name}: the superblock was not written: {error}"
                )
            tell(error)

        self._committing += 1
        start(self._commit(batch, tell), self._exports, ended)

    def _commit(self, batch: Batch, tell: Done) -> Program[None]:
        """`tell` is called when the point is there. The next commit may begin then, while this
        program writes the superblock."""
        if batch.error is not None:
            raise batch.error
        superblock = self.superblocks.current
        assert superblock.state in (State.SEEDING, State.OK, State.TORN), superblock.state
        is_first = superblock.state is not State.OK
        header = batch.header(superblock.generation, self.digest)
        index, block = bytes(batch.index), header.pack()
        yield [*self._writes(header.index_place, index), *self._writes(header.place, block)]
        flushes = [Flush(Side.JOURNAL), *([Flush(Side.IMAGE)] if is_first else [])]
        yield from self.superblocks.alone(self._make_last(batch, header, flushes))
        number = header.point.sequence
        if is_first:
            yield from self.superblocks.update(
                state=State.OK, since_ns=header.point.time_ns, newest=number
            )
            self._committed(header, index)
            return
        self._committed(header, index)
        tell(None)
        yield from self.superblocks.note_newest(number)

    def _make_last(self, batch: Batch, header: Header, flushes: Sequence[Request]) -> Program[None]:
        """The flush, and the footer."""
        superblocks, failure = self.superblocks, self.superblocks.failure
        if failure is not None and failure is not batch.failure:
            raise failure
        yield from superblocks.check(beside=flushes)
        number = header.point.sequence
        self._problem = JournalError(f"{self.name}: the outcome of point {number} is not known")
        self._head = header.end  # what seeds the image after an error is behind it: it may be there
        yield self._writes(header.footer_place, pack_footer(header), is_durable=True)

    def _committed(self, header: Header, index: bytes) -> None:
        self._problem = None
        self.digest, self.newest = header.digest, header.point
        self.headers.append(header)
        self.last_batch.committed(header, index)

    def give_up(self, done: Done) -> None:
        """The open point is none. `done` when nothing of it is in flight any more."""
        batch = self._batch
        assert batch is not None, "no point is open"
        self._batch = None
        self._on_idle = done
        self._send_gathered(batch)
        self._look()

    def _look(self) -> None:
        if not self._in_flight and self._on_idle is not None:
            done, self._on_idle = self._on_idle, None
            done(None)

    def _has_room(self, batch: Batch, data_bytes: int, index_bytes: int) -> bool:
        index = blocks(len(batch.index) + index_bytes)
        end = batch.next + data_bytes + index + BLOCK_BYTES
        return end - self._tail <= self.superblocks.current.ring_bytes

    def _gather(self, batch: Batch, data: list[Buffer], length: int, done: Done) -> None:
        """Send a write of `length` bytes now, or with others: what comes while a write is in flight
        waits for that one's end, and goes as one request. So small writes are joined as far as the
        far side is slower than the source, and a single one does not wait."""
        if length >= GATHER_BYTES:
            self._send_gathered(batch)
        batch.gather(data, length, done)
        if not batch.requests or batch.gathered_bytes >= GATHER_BYTES:
            self._send_gathered(batch)

    def _send_gathered(self, batch: Batch) -> None:
        if not batch.gathered_bytes:
            return
        place, gathered, waiting = batch.take_gathered()
        data = self.last_batch.keep(place, gathered)
        batch.requests += 1

        def ended(error: BaseException | None) -> None:
            batch.requests -= 1
            for done in waiting:
                done(error)
            self._send_gathered(batch)

        self._send(batch, self._writes(place, data), ended)

    def _send(self, batch: Batch, writes: Sequence[Request], done: Done) -> None:
        def all_ended(error: BaseException | None) -> None:
            batch.error = batch.error or error
            self._in_flight -= 1
            done(batch.error)
            self._look()

        self._in_flight += 1
        ended = all_of(len(writes), all_ended)
        for write in writes:
            write.start(self._export, ended)

    def _writes(self, place: int, data: Buffer, *, is_durable: bool = False) -> list[Write]:
        """Requests that write `data` at `place` of the ring."""
        view, done, found = memoryview(data), 0, []
        for at, span in self.superblocks.current.spans(place, len(view)):
            for offset, length in pieces(at, span, REQUEST_BYTES_MAX):
                found.append(Write(Side.JOURNAL, view[done : done + length], offset, is_durable))
                done += length
        return found


def _entries_of(content: memoryview, offset: int, end: int, place: int) -> list[bytes]:
    """The entries of a long range that ends at `end` of the disk."""
    return [
        pack_data(
            offset + start,
            min(span, end - offset - start),
            place + start,
            zlib.crc32(content[start : start + span]),
        )
        for start, span in pieces(0, len(content), ENTRY_BYTES_MAX)
    ]
