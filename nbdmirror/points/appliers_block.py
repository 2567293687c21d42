"""The applier's block: what a process beside the image says of itself (docs/points-format.md).

An applier (follower.py) makes the image each point that the journal's superblock grants it. It
writes to no superblock: those are the source's. It has two blocks of its own behind the ring, which
are written by turns. Of two sound ones the one with the greater serial number counts. So there is a
sound one at every moment, whatever a power cut does to the other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

from nbdmirror.points.format import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    RING_START,
    SAMPLES_MAX,
    SERIAL_MAX,
    VERSION,
    JournalError,
    Sample,
    Superblock,
    check_seal,
    pack_samples,
    sealed,
    unpack_samples,
)
from nbdmirror.points.requests import Program, Read, Side, Write

SLOTS = (0, 64 << 10)
"""Where the blocks are, from the ring's end: so far apart that no physical block has both."""

PLACE_BYTES = 128 << 10
"""What a new journal keeps for that behind its ring."""

EXPORT_BYTES_MIN = 32 << 20
"""A smaller new journal has no place for an applier: it needs all of its space itself."""

_BLOCK = struct.Struct("<4sIQ16sQQqI4xI4x32s")


class Phase(Enum):
    """What the applier does."""

    ENDED = 0
    """It writes nothing to the image any more. Another one has another number."""
    RESTING = 1
    """It writes nothing to the image until it has said WORKING, and has read a grant after that."""
    WORKING = 2
    """It may be writing to the image."""
    DONE = 3
    """As RESTING; the image, flushed, is the point that was granted."""


_KNOWN_PHASES = {phase.value: phase for phase in Phase}


@dataclass(frozen=True, slots=True)
class ApplierBlock:
    """What an applier says. Each time that it says something, `serial` is greater."""

    disk_id: bytes
    applier: int
    """A random number of the process; not 0."""
    phase: Phase
    serial: int = 1
    point: int = 0
    """The sequence of the point that it works on, or that is done; 0: none."""
    time_ns: int = 0
    """Wall time at which this was said, nanoseconds since 1970."""
    digest: bytes = bytes(DIGEST_BYTES)
    """Of the header of the point that is done."""
    samples: tuple[Sample, ...] = ()
    """What the image reads as since the point is done."""

    def pack(self) -> bytes:
        head = _BLOCK.pack(
            b"NBMA", VERSION, self.serial, self.disk_id, self.applier, self.point, self.time_ns,
            self.phase.value, len(self.samples), self.digest,
        )  # fmt: skip
        return sealed(head + pack_samples(self.samples))

    def has_done(self, block: Superblock, digest: bytes) -> bool:
        """It was granted the point `block.applying`, whose header has `digest`, and the image is
        this point now."""
        is_granted = self.applier == block.applier and self.point == block.applying
        return self.phase is Phase.DONE and is_granted and self.digest == digest


def unpack(data: bytes, disk_id: bytes) -> ApplierBlock | None:
    """None: the data is no sound block of an applier of this journal."""
    try:
        check_seal(data)
    except JournalError:
        return None
    fields = _BLOCK.unpack_from(data)
    magic, version, serial, its_disk, applier, point, time_ns, phase, count, digest = fields
    is_known = (magic, version, its_disk) == (b"NBMA", VERSION, disk_id)
    is_possible = phase in _KNOWN_PHASES and count <= SAMPLES_MAX and serial <= SERIAL_MAX
    if not is_known or not is_possible:
        return None
    return ApplierBlock(
        disk_id=its_disk,
        applier=applier,
        phase=_KNOWN_PHASES[phase],
        serial=serial,
        point=point,
        time_ns=time_ns,
        digest=digest,
        samples=unpack_samples(data, _BLOCK.size, count),
    )


def has_place(block: Superblock, export_bytes: int) -> bool:
    """The journal of the superblock `block`, on an export of `export_bytes`, has room for an
    applier's block behind its ring."""
    return _slot(block, 1) + BLOCK_BYTES <= export_bytes


def _slot(block: Superblock, number: int) -> int:
    return RING_START + block.ring_bytes + SLOTS[number]


def read_block(block: Superblock, export_bytes: int) -> Program[ApplierBlock | None]:
    """What the last applier of the journal has said; None: nothing yet. Raises IO_ERRORS."""
    if not has_place(block, export_bytes):
        return None
    bufs = [bytearray(BLOCK_BYTES) for _ in SLOTS]
    yield [
        Read(Side.JOURNAL, memoryview(buf), _slot(block, number)) for number, buf in enumerate(bufs)
    ]
    found = [one for buf in bufs if (one := unpack(bytes(buf), block.disk_id)) is not None]
    return max(found, key=lambda one: one.serial, default=None)


def write_of(block: Superblock, said: ApplierBlock) -> Write:
    """The request that says `said`, durably, in the journal of the superblock `block`. Blocks of
    serial numbers that follow one another go to different slots."""
    return Write(Side.JOURNAL, said.pack(), _slot(block, said.serial % 2), is_durable=True)


# Whether an applier lives.

BEAT_S = 1.0
"""An applier says something at least so often."""

GONE_S = 5.0
"""One that has said nothing new for so long is taken to be gone."""


class Presence(Enum):
    NONE = "none"
    """There was no applier, or the last one has ended in order."""
    UNKNOWN = "unknown"
    """Whether it lives shows within GONE_S."""
    ALIVE = "alive"
    GONE = "gone"


class Watch:
    """What somebody knows who looks at an applier's block from time to time."""

    def __init__(self) -> None:
        self.presence = Presence.NONE
        self.sampled_for = 0
        """The applier that was given samples of the image."""
        self._said: tuple[int, int] | None = None
        self._since_s = self._looked_s = 0.0

    def note(self, said: ApplierBlock | None, now_s: float) -> Presence:
        """`said` was read at `now_s`, by a monotonic clock."""
        before, looked_s, self._looked_s = self._said, self._looked_s, now_s
        self._said = (said.applier, said.serial) if said is not None else None
        if said is None or said.phase is Phase.ENDED:
            self.presence = Presence.NONE
        elif self._said != before:
            is_near = before is not None and now_s - looked_s <= GONE_S
            was_it = before is not None and before[0] == said.applier
            self.presence = Presence.ALIVE if is_near and was_it else Presence.UNKNOWN
            self._since_s = now_s
        elif now_s - self._since_s >= GONE_S:
            self.presence = Presence.GONE
        return self.presence

    @property
    def silent_s(self) -> float:
        """For how long the applier had said nothing new when it was looked at last."""
        return self._looked_s - self._since_s
