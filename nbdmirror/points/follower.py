"""Follower: a process beside an image that makes the image each point that the source grants it.

The superblock says which point (`applying`), and to whom (`applier`); delegation.py is the source's
side. What follows has one order, in which each step is durable before the next:

    1. every byte that will be needed is read and checked; nothing is changed if one is damaged
    2. the applier's block: WORKING
    3. the superblock is read again, and still grants the point; so it is before each group of
       writes, and between two writes of a group if LOOK_S has passed
    4. the newest content of each range, from the base to the point, goes to the image
    5. the image is flushed
    6. the applier's block: DONE

Whoever withdraws a grant (a recovery does) writes the superblock first, and reads the applier's
block then: if that is not WORKING, step 3 shows the applier that there is no grant; else the
applier sees it before its next writes, and says RESTING. So nobody writes beside it.

A process that ends in between loses nothing: the image is between the base and the point, as the
superblock says, and the next applier does all of it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from nbdmirror.points.applier import check, headers_to, write_parts
from nbdmirror.points.appliers_block import (
    BEAT_S,
    ApplierBlock,
    Phase,
    has_place,
    read_block,
    write_of,
)
from nbdmirror.points.format import IN_USE, JournalError, Sample, State, Superblock
from nbdmirror.points.reader import DamagedData, Journal, Part, check_export, newest_parts, read
from nbdmirror.points.recovery import check_image, check_size
from nbdmirror.points.requests import Flush, Program, Request, Side, around
from nbdmirror.points.superblocks import JournalTaken, find, taken_text, wall_time

LOOK_S = BEAT_S / 2
"""After so long, and the request that is being made, an applier at work looks around again. Whoever
sees no sign of life for GONE_S takes it to be gone."""


class Withdrawn(Exception):
    """The point is not granted any more."""


class Follower:
    """Its programs are carried out one after the other."""

    def __init__(
        self,
        name: str,
        export_bytes: int,
        image_bytes: int,
        *,
        number: int,
        wall_time_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.monotonic,
        is_to_end: Callable[[], bool] = lambda: False,
    ) -> None:
        """`name`: the journal's description, for messages. `number`: random, and not 0. `is_to_end`
        is asked before each group of writes, and while much is read."""
        self.name = name
        self.point = 0
        """The last one that was done."""
        self._export_bytes = export_bytes
        self._image_bytes = image_bytes
        self._number = number
        self._wall_time_ns = wall_time_ns
        self._clock = clock
        self._is_to_end = is_to_end
        self._block: Superblock | None = None
        """As it was read last."""
        self._said: ApplierBlock | None = None
        self._said_s = self._looked_s = 0.0
        self._done: tuple[object, ...] = ()
        """What the superblock said of the last point that was done."""
        self._granter = 0
        """The generation of the source that has granted a point last."""
        self._is_image_known = False
        self._is_other = False
        """The applier's block is another one's."""

    @property
    def disk_id(self) -> bytes:
        """The ID of the disk in the journal. After `look`."""
        assert self._block is not None
        return self._block.disk_id

    # Beginning and end.

    def look(self) -> Program[ApplierBlock | None]:
        """What another applier has said; None: there was none, or the last one has ended in order.
        Raises JournalError if this journal cannot have an applier."""
        block = yield from self._superblock()
        check_export(self.name, block, self._export_bytes)
        if not has_place(block, self._export_bytes):
            text = "has no place for an applier: the source applies its points; a journal that is"
            raise JournalError(f"{self.name}: {text} created on 32 MiB or more has one")
        check_size(self.name, block, self._image_bytes)
        said = yield from read_block(block, self._export_bytes)
        return said if said is not None and said.phase is not Phase.ENDED else None

    def announce(self, other: ApplierBlock | None) -> Program[None]:
        """Become the journal's applier. `other`: what `look` has found, which has not changed
        since. Raises JournalTaken if it has."""
        block = yield from self._superblock()
        said = yield from read_block(block, self._export_bytes)
        if other is not None and said != other:
            raise JournalTaken(other_text(self.name))
        serial = said.serial if said is not None else 0
        self._said = ApplierBlock(block.disk_id, self._number, Phase.ENDED, serial)
        yield from self._write(Phase.RESTING)
        yield from self._check_mine()

    def end(self) -> Program[None]:
        """Nothing is in flight: the source may take the image back."""
        if self._said is not None and not self._is_other:
            yield from self._say(Phase.ENDED)

    def beat(self) -> Program[None]:
        """Show that this process lives, if it is time. Raises JournalTaken."""
        if self._clock() - self._said_s >= BEAT_S:
            said = self._last
            yield from self._say(said.phase, **_kept(said))

    # A point.

    def step(self) -> Program[bool]:
        """Make the image the point that is granted. Returns false if there is none. Raises
        JournalTaken if the journal is nobody's to apply any more, JournalError if it is damaged,
        with the image unchanged, and IO_ERRORS."""
        block = yield from self._superblock()
        if not self._is_granted(block) or self._key(block) == self._done:
            return False
        self._granter = block.generation
        try:
            return (yield from self._make(block))
        except Withdrawn:
            yield from self._say(Phase.RESTING)
        except JournalTaken:
            raise
        except JournalError:
            if self._key((yield from self._superblock())) == self._key(block):
                raise
        return False  # the source has changed it meanwhile, and has used the space again

    def _make(self, block: Superblock) -> Program[bool]:
        """Make the image the point that `block` grants. Returns false if the image is that point
        already, or the grant has changed."""
        journal = yield from read(self.name, self._export_bytes, until=block.applying)
        if self._key(journal.superblock) != self._key(block):
            return False
        headers = headers_to(journal, block.applying)
        if not headers or headers[-1].point.sequence != block.applying:
            text = "; ".join(journal.damage) or f"point {block.applying} is not there"
            raise JournalError(f"{self.name}: {text}")
        if self._last.phase is Phase.DONE and self._last.digest == headers[-1].digest:
            # Another process has the source now. It may see DONE at any moment, and take the image.
            self._done = self._key(block)
            return False
        yield from self._put(journal, block)
        return True

    def _put(self, journal: Journal, block: Superblock) -> Program[None]:
        headers = headers_to(journal, block.applying)
        covered = yield from self._attended(check(journal, headers))
        if not self._is_image_known:
            yield from check_image(journal, covered)
            self._is_image_known = True
        point = block.applying
        yield from self._say(Phase.WORKING, point=point)
        samples: list[Sample] = []

        def write(parts: list[Part]) -> Program[None]:
            yield from write_parts(journal, parts, samples)

        try:
            yield from self._attended(newest_parts(journal, headers, write), block)
        except DamagedData as error:  # sound when it was checked: its space was used again
            raise Withdrawn from error
        yield [Flush(Side.IMAGE)]
        done = {"point": point, "digest": headers[-1].digest, "samples": tuple(samples)}
        yield from self._say(Phase.DONE, **done)
        self._done, self.point = self._key(block), point

    def _attended(self, program: Program[Any], grant: Superblock | None = None) -> Program[Any]:
        """`program`, one request after the other, with signs of life in between; and the image is
        changed only as long as there is the grant of `grant`. All this is looked at before each
        list of requests, and within one if it is time: a list may take a slow image minutes."""

        def one_by_one(requests: Sequence[Request]) -> Program[Sequence[Request]]:
            for number, request in enumerate(requests):
                if not number or self._clock() - self._looked_s >= LOOK_S:
                    yield from self._look_around(grant if request.side is Side.IMAGE else None)
                yield [request]
            return ()

        return around(program, one_by_one)

    def _look_around(self, grant: Superblock | None) -> Program[None]:
        self._looked_s = self._clock()
        if self._is_to_end():
            raise Withdrawn
        yield from self.beat()
        if grant is not None:
            block = yield from self._superblock()
            if self._key(block) != self._key(grant):
                raise Withdrawn
            yield from self._check_mine()

    # What the journal says.

    def _superblock(self) -> Program[Superblock]:
        """Raises JournalTaken if the journal needs no applier any more."""
        block, before = (yield from find(self.name)).current, self._block
        if before is not None and before.disk_id != block.disk_id:
            self._is_other = True
            raise JournalTaken(f"{self.name}: another journal was made where this one was")
        self._block = block
        if block.state in IN_USE:
            raise JournalTaken(self._end_text(block))
        return block

    def _is_granted(self, block: Superblock) -> bool:
        is_mine = block.applier == self._number and bool(block.applying)
        return is_mine and block.state is State.OK

    def _key(self, block: Superblock) -> tuple[object, ...]:
        """Two superblocks with the same one grant the same."""
        grant = (block.disk_id, block.generation, block.state, block.applier, block.applying)
        return (*grant, block.base_digest)

    def _check_mine(self) -> Program[None]:
        assert self._block is not None
        said = yield from read_block(self._block, self._export_bytes)
        if said is not None and said.applier != self._number:
            self._is_other = True
            raise JournalTaken(other_text(self.name))

    def _end_text(self, block: Superblock) -> str:
        if block.state is State.PROMOTED and block.generation == self._granter:
            text = f"the mirror has ended at {wall_time(block.since_ns)}: the image is in use"
            return f"{self.name}: {text}, and is point {block.base.sequence}"
        return taken_text(self.name, block)

    # What the applier says.

    @property
    def _last(self) -> ApplierBlock:
        assert self._said is not None, "not announced"
        return self._said

    def _say(self, phase: Phase, **what: Any) -> Program[None]:
        yield from self._check_mine()
        yield from self._write(phase, **what)

    def _write(self, phase: Phase, **what: Any) -> Program[None]:
        last, block = self._last, self._block
        assert block is not None
        self._said = ApplierBlock(
            disk_id=last.disk_id,
            applier=self._number,
            phase=phase,
            serial=last.serial + 1,
            time_ns=self._wall_time_ns(),
            **what,
        )
        self._said_s = self._clock()
        yield [write_of(block, self._said)]


def _kept(said: ApplierBlock) -> dict[str, Any]:
    return {"point": said.point, "digest": said.digest, "samples": said.samples}


def other_text(name: str) -> str:
    return f"{name}: another `nbdmirror apply` is at work on this journal"
