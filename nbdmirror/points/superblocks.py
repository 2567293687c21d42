"""The journal's two superblocks: finding the one that counts, and changing it.

A change is written to the slot that does not count, and is durable before the other slot is
written. So there is a sound superblock at every moment, whatever a power cut does to the other.
Both say the same before anything is done that relies on them, so that damage to one of them later
brings no older state back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nbdmirror.errors import IO_ERRORS
from nbdmirror.points.format import BLOCK_BYTES, MAGIC, SLOTS, JournalError, State, Superblock
from nbdmirror.points.requests import Program, Read, Request, Side, Turn, Turns, Write


class JournalTaken(JournalError):
    """Another process writes to the journal, or a user has recovered a point from it."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the two slots hold."""

    current: Superblock
    slot: int
    """The number of the slot that holds `current`: 0 or 1."""
    damage: tuple[str, ...]
    """A line for a slot that cannot be used."""


def find(name: str, beside: Sequence[Request] = ()) -> Program[Found]:
    """Read both superblocks of the journal `name`, and do the requests `beside` at the same time.
    Raises JournalError if there is none."""
    bufs = [bytearray(BLOCK_BYTES) for _ in SLOTS]
    reads = [Read(Side.JOURNAL, memoryview(buf), at) for buf, at in zip(bufs, SLOTS, strict=True)]
    yield [*beside, *reads]
    found: list[tuple[Superblock, int]] = []
    problems: list[str] = []
    for slot, buf in enumerate(bufs):
        try:
            found.append((Superblock.unpack(bytes(buf)), slot))
        except JournalError as error:
            problems.append(f"superblock {'AB'[slot]} {error}")
    if not found:
        if not any(map(any, bufs)):
            raise JournalError(f"{name}: is not a journal: it is empty")
        if not any(buf.startswith(MAGIC) for buf in bufs):
            raise JournalError(f"{name}: is not a journal: it holds something else")
        raise JournalError(f"{name}: {'; '.join(problems)}")
    current, slot = max(found, key=lambda one: one[0].serial)
    return Found(current, slot, tuple(problems))


@dataclass(slots=True)
class Written:
    """What this process has tried to write, or has read before. Over lost connections too: whether
    a request that was lost with one was carried out is not known."""

    serial: int = 0
    """The greatest."""
    generations: set[int] = field(default_factory=set)


class Superblocks:
    """The superblock of a journal that this process writes to. All changes go through `update`."""

    def __init__(self, name: str, found: Found, written: Written | None = None) -> None:
        """`name`: the journal's description, for messages. `written`: until a connection was
        lost."""
        self.current = found.current
        self.failure: BaseException | None = None
        """Of the last write that has failed."""
        self.written = Written() if written is None else written
        self._name = name
        self._slot = found.slot
        self._note(found.current)
        self._turns = Turns()

    def _note(self, block: Superblock) -> None:
        self.written.serial = max(self.written.serial, block.serial)
        self.written.generations.add(block.generation)

    def check(self, beside: Sequence[Request] = ()) -> Program[None]:
        """Raise JournalTaken if the journal is another process's by now. Does the requests `beside`
        at the same time."""
        found = yield from find(self._name, beside)
        self.check_ours(found.current)

    def update(self, **changes: Any) -> Program[None]:
        """Change fields of both superblocks; the change is durable at the end. One at a time. So
        damage to one of them brings no older state back."""
        yield from self.alone(self._update(changes, {}))

    def note_newest(self, sequence: int) -> Program[None]:
        """Note that there is a point `sequence`. One superblock is enough for that."""
        yield from self.alone(self._update({"newest": sequence}))

    def alone(self, program: Program[None]) -> Program[None]:
        """`program`, with no change of a superblock beside it."""
        yield [Turn(self._turns)]
        try:
            yield from program
        finally:
            self._turns.release()

    def _update(self, *writes: Mapping[str, Any]) -> Program[None]:
        yield from self.check()
        try:
            for changes in writes:
                yield from self._write(changes)
        except IO_ERRORS as error:
            self.failure = error
            raise

    def _write(self, changes: Mapping[str, Any]) -> Program[None]:
        new = replace(self.current, serial=self.current.serial + 1, **changes)
        slot = 1 - self._slot
        self._note(new)
        yield [Write(Side.JOURNAL, new.pack(), SLOTS[slot], is_durable=True)]
        self.current, self._slot = new, slot

    def check_ours(self, other: Superblock) -> None:
        """Raise JournalTaken if `other` was written by another process since."""
        ours = self.written
        is_ours = other.generation in ours.generations and other.serial <= ours.serial
        if not is_ours:
            raise JournalTaken(taken_text(self._name, other))


TAKEN = "another process writes to this journal: a recovery, or another server"


def taken_text(name: str, other: Superblock) -> str:
    """Why this process must not write to the journal that has the superblock `other`."""
    if other.state is State.PROMOTED:
        when = wall_time(other.since_ns)
        text = f"point {other.base.sequence} was recovered from this journal at {when}"
        return f"{name}: {text}: the image is in use there"
    if other.state is State.SERVED:
        when = wall_time(other.since_ns)
        text = f"point {other.applying} of this journal is served since {when}"
        return f"{name}: {text}: the image is in use there"
    # A recovery refuses the writer before it changes the state: see `ownership.claim`.
    return f"{name}: {TAKEN}"


def wall_time(time_ns: int) -> str:
    """A time as users read and write it: local, with the zone, in milliseconds. Rounded up, so that
    a point's time names the point."""
    milliseconds = -(-time_ns // 10**6)
    local = time.localtime(milliseconds // 1000)
    date, zone = time.strftime("%Y-%m-%d %H:%M:%S", local), time.strftime("%z", local)
    return f"{date}.{milliseconds % 1000:03d}{zone}"
