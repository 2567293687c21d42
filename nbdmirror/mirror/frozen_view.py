"""FrozenView: the content of a point, as its sender reads it: each granule once, as of the cut.

What guests have saved comes first, since it frees memory. The rest is read from the source. Guests
may change a granule as soon as it was read into memory, and do not wait until it was sent: `Chunk`
holds the content until `settled`. A chunk that is lost on its way cannot be read again. Then the
point is broken off (frozen.py).

On the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from nbdmirror.devices.base import AsyncSource, Extent, Run, leading_bytes
from nbdmirror.disk.claim import Claim, Range
from nbdmirror.disk.frozen import Frozen
from nbdmirror.disk.saved import Saved
from nbdmirror.errors import DeviceError
from nbdmirror.mirror.buffers import Buffers, PageBuffer

CHUNK_BYTES = 1 << 20
"""Largest chunk of data, if a granule is not larger."""

HOLE_BYTES = 64 << 20
"""Largest range whose extents are queried at once. Guests that write there wait for the answer."""


@dataclass(slots=True, eq=False)
class Chunk:
    """A part of the point's content."""

    runs: list[Run]
    """Each range of the point once."""
    memory_bytes: int = 0
    """Of the data."""
    buffer: PageBuffer | None = None
    """The memory of the data, if it can be used again."""


class FrozenView:
    """`on_chunk` gets each chunk, perhaps before `read_next` returns. A read that fails breaks the
    point."""

    def __init__(
        self,
        frozen: Frozen,
        source: AsyncSource,
        *,
        on_chunk: Callable[[Chunk], None],
        buffers: Buffers,
    ) -> None:
        self._frozen = frozen
        self._source = source
        self._on_chunk = on_chunk
        self._buffers = buffers
        self._chunk_bytes = max(CHUNK_BYTES, frozen.covered.granularity)
        self._data_until = 0
        self._reads = 0
        self._unsettled: set[Chunk] = set()
        self.in_flight_bytes = 0
        """Memory for chunks that are being read, or not settled yet."""

    @property
    def is_settled(self) -> bool:
        """All of the point was given to `on_chunk`, and settled."""
        return not self._reads and not self._unsettled and self._frozen.is_read

    def read_next(self) -> bool:
        """Begin to read the next chunk. False if there is nothing to read now: everything was read,
        or guests are saving the rest (Frozen calls `on_saved` then)."""
        if self._frozen.error is not None:
            return False
        saved = self._frozen.saved
        if found := saved.take(self._chunk_bytes):
            self._give_saved(found)
            return True
        if saved.may_read_spilled:
            self._reads += 1
            saved.read_spilled(self._have_spilled)
            return True
        claim = self._frozen.claim(max(HOLE_BYTES, self._chunk_bytes))
        if claim is None:
            return False
        self._reads += 1
        if claim.length <= self._chunk_bytes or claim.offset < self._data_until:
            self._read(claim)
        else:
            self._source.start_extents(
                claim.offset, claim.length, lambda extents, _: self._have_extents(claim, extents)
            )
        return True

    def settled(self, chunk: Chunk) -> None:
        """The far side has acknowledged a chunk: its memory is used again."""
        self._unsettled.remove(chunk)
        self.in_flight_bytes -= chunk.memory_bytes
        if chunk.buffer is not None:
            self._buffers.keep(chunk.buffer)

    def _have_extents(self, claim: Claim, extents: list[Extent] | None) -> None:
        """Without an answer the range counts as data (rule 31). The claim is owned since before the
        query, so the answer is about the content of the cut."""
        zero = leading_bytes(extents or [], zero=True)
        if zero < claim.length:
            zero -= zero % self._frozen.covered.granularity
        if not zero:
            self._data_until = claim.offset + leading_bytes(extents or [], zero=False)
            self._read(claim)
            return
        self._frozen.shrink(claim, zero)
        parts = self._frozen.parts_of(claim)
        if self._have_read(claim, None):
            self._give(Chunk([(at, length, None) for at, length in parts]))

    def _read(self, claim: Claim) -> None:
        self._frozen.shrink(claim, self._chunk_bytes)
        parts = self._frozen.parts_of(claim)
        start = parts[0][0]
        length = sum(parts[-1]) - start
        try:
            buffer = self._buffers.take(length)
        except DeviceError as error:  # guests that wait for the claim must not wait for ever
            self._have_read(claim, error)
            return
        memory_bytes = len(buffer.view)
        self.in_flight_bytes += memory_bytes

        def then(error: BaseException | None) -> None:
            if self._have_read(claim, error):
                self._give(Chunk(_runs_of(buffer, parts), memory_bytes, buffer))

        self._source.start_read(buffer.view[:length], start, then)

    def _have_read(self, claim: Claim, error: BaseException | None) -> bool:
        """A read has ended. Returns whether what was found is the content of the cut."""
        if error is not None:
            self._frozen.break_off(error)
        self._reads -= 1
        return self._frozen.read(claim)

    def _have_spilled(self, found: list[Saved], error: BaseException | None) -> None:
        self._reads -= 1
        if error is not None:
            self._frozen.break_off(error)
        if self._frozen.error is None and found:
            self._give_saved(found)

    def _give_saved(self, found: list[Saved]) -> None:
        runs: list[Run] = []
        memory_bytes = 0
        for saved in found:
            if saved.content is None:
                runs += [(at, length, None) for at, length in saved.parts]
            else:
                runs += _runs_of(PageBuffer.around(saved.content), saved.parts)
                memory_bytes += len(saved.content)
        self.in_flight_bytes += memory_bytes
        self._give(Chunk(runs, memory_bytes))

    def _give(self, chunk: Chunk) -> None:
        self._unsettled.add(chunk)
        self._on_chunk(chunk)


def _runs_of(buffer: PageBuffer, parts: tuple[Range, ...]) -> list[Run]:
    """`buffer` begins with the first part."""
    start = parts[0][0]
    return list(chain.from_iterable(buffer.runs(at, span, at - start) for at, span in parts))
