"""Views of points that stay open while the source goes on (nbdmirror/points/view.py).

After each step each open view is read. It must be what the disk was at the cut of its point, or
refuse. Between the view's requests the source's requests end, as they do beside a real reader. A
view may refuse only if the image is not what the view needs any more.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from random import Random

from hypothesis.stateful import rule
from model import choices as st
from model.pointexports import SECTOR, DiskDevice, Pending, content
from model.pointmachine import PointMachine
from model.pointworld import BLOCKS, PointWorld

from nbdmirror.devices.base import Extent
from nbdmirror.errors import DeviceError
from nbdmirror.points import view
from nbdmirror.points.format import BLOCK_BYTES, JournalError, State, Superblock
from nbdmirror.points.index import Piece
from nbdmirror.points.reader import fetch, read
from nbdmirror.points.requests import Side, run

VIEWS_MAX = 3


class BusyDevice(DiskDevice):
    """An export that the source uses as well: some of its requests end around each read."""

    def __init__(self, world: ViewedWorld, side: Side, random: Random) -> None:
        super().__init__(world.exports[side].disk)
        self.world = world
        self.side = side
        self.random = random

    def pread(self, buf: memoryview, offset: int) -> None:
        if self.side is Side.IMAGE and self.world.is_hasty:
            self.world.is_hasty = False
            self.world.end_all()
        self._go_on()
        buf[:] = memoryview(self.disk.data)[offset : offset + len(buf)]
        self._go_on()

    def extents(self, offset: int, length: int) -> list[Extent]:
        self._go_on()
        blocks = range(offset, offset + length, BLOCK_BYTES)
        kinds = [not any(self.disk.data[at : at + BLOCK_BYTES]) for at in blocks]
        self._go_on()
        return [Extent(BLOCK_BYTES, zero=kind, hole=kind) for kind in kinds]

    def _go_on(self) -> None:
        is_still = self.world.is_still or self.world.is_hasty
        for _ in range(0 if is_still else self.random.choice((0, 0, 1, 4))):
            self.world.end_request(self.random.randrange(12), fails=False)

    def pwrite(self, buf: object, offset: int, fua: bool = False) -> None:
        raise AssertionError("lost: a view has written")

    def flush(self) -> None:
        raise DeviceError("a view has flushed", errno.EIO)


@dataclass
class OpenView:
    device: view.PointView
    disk_id: bytes
    sequence: int
    generation: int
    expected: list[int]


class ViewedWorld(PointWorld):
    """Mutants override the class of views."""

    view_class: type[view.PointView] = view.PointView

    def __init__(self, seed: int) -> None:
        self.views: list[OpenView] = []
        self.is_still = False
        """No request of the source ends while a view reads."""
        self.is_hasty = False
        """All end right before a view reads the image next, and none until then."""
        super().__init__(seed)

    def open_view(self, back: int) -> None:
        """Of the point that is `back` points before the newest on offer."""
        sides = {side: BusyDevice(self, side, self.random) for side in Side}
        journal = run(read("journal", self.journal.size), self.sides())
        if len(journal.points) <= back:
            return
        wanted = str(journal.points[-1 - back].sequence)
        program = view.look_up("journal", self.journal.size, self.image.size, wanted=wanted)
        try:
            found = run(program, sides)
        except JournalError:  # not on offer any more, as of a request that ended meanwhile
            return
        device = self.view_class(sides[Side.IMAGE], sides[Side.JOURNAL], found)
        block, point = found.journal.superblock, found.point
        expected = self.cuts[point.time_ns]
        one = OpenView(device, block.disk_id, point.sequence, block.generation, expected)
        self.views = [one, *self.views][:VIEWS_MAX]

    def check(self) -> None:
        self.views = [one for one in self.views if self.is_right(one)]

    def footers(self) -> list[Pending]:
        return [one for one in self.journal.pending if one.name == "durable write"]

    def point_to_its_footer(self) -> None:
        """A point, until its footer is being written."""
        self.cut_and_send()
        self.end_while(lambda: self.writer.is_busy)
        self.finish()
        self.end_while(lambda: self.phase == "committing" and not self.footers())

    def is_right(self, one: OpenView) -> bool:
        """Whether the view serves its point; false: it refuses."""
        found = bytearray(BLOCKS * BLOCK_BYTES)
        middle = self.random.randrange(0, len(found), SECTOR)
        try:
            one.device.pread(memoryview(found)[:middle], 0)
            one.device.pread(memoryview(found)[middle:], middle)
            extents = one.device.extents(0, len(found))
        except DeviceError as error:
            if self.may_refuse(one):
                return False
            raise AssertionError(f"lost: a view refuses: {error}") from error
        expected = b"".join(map(content, one.expected))
        is_right = bytes(found) == expected
        assert is_right, f"lost: a view of point {one.sequence} is wrong"
        at = 0
        for extent in extents:
            part, at = expected[at : at + extent.length], at + extent.length
            assert not extent.zero or not any(part), "lost: an extent is no zeroes"
        return True

    def may_refuse(self, one: OpenView) -> bool:
        try:
            journal = run(read("journal", self.journal.size), self.sides())
        except JournalError:
            return True
        block: Superblock = journal.superblock
        is_ok = block.disk_id == one.disk_id and block.state is State.OK
        newest = max(block.base.sequence, block.applying)
        # Of another generation the point may be there, and not be the same.
        is_same = block.generation == one.generation
        return not is_ok or newest > one.sequence or not is_same


class ViewMachine(PointMachine):
    world_class = ViewedWorld

    @property
    def viewed(self) -> ViewedWorld:
        assert isinstance(self.world, ViewedWorld)
        return self.world

    @rule(back=st.integers(0, 2))
    def view_is_opened(self, back: int) -> None:
        self.viewed.open_view(back)

    @rule(back=st.integers(1, 2), count=st.integers(1, 3))
    def point_is_served_while_a_later_one_is_applied(self, back: int, count: int) -> None:
        w = self.viewed
        w.end_all()
        for _ in range(2):
            w.write(w.random.randrange(BLOCKS), 1, zero=False)
            w.whole_point("all")
        w.open_view(back)
        w.apply(0)
        w.end_while(lambda: not w.image.pending)
        for _ in range(count):
            if w.image.pending:
                w.image.end(0)

    @rule(back=st.integers(1, 2), first=st.integers(0, BLOCKS - 1))
    def point_is_served_as_a_later_one_begins_to_be_applied(self, back: int, first: int) -> None:
        """The superblock that says so is being written, and the image comes at once after it: as
        the view has read the superblock, and reads the image."""
        w = self.viewed
        w.end_all()
        w.apply(0)
        w.end_all()
        for block in range(3):
            w.write((first + block) % BLOCKS, 1, zero=False)
            w.whole_point("all")
        w.open_view(back)
        w.apply(0)
        w.end_while(lambda: not w.footers())
        w.is_hasty = bool(w.footers())

    @rule(first=st.integers(0, BLOCKS - 1))
    def point_is_served_first_when_the_image_has_it(self, first: int) -> None:
        """Nothing of the point was read before its space in the journal was freed."""
        w = self.viewed
        w.end_all()
        w.write(first, 1, zero=False)
        w.whole_point("all")
        w.open_view(0)
        w.apply(0)
        w.end_all()

    @rule(first=st.integers(0, BLOCKS - 1), other=st.integers(0, BLOCKS - 1))
    def point_is_served_before_it_lasts(self, first: int, other: int) -> None:
        """Its footer can be read, and is lost in a power cut."""
        w = self.viewed
        w.end_all()
        w.apply(0)
        w.end_all()
        w.write(first, 1, zero=False)
        w.point_to_its_footer()
        if w.phase == "committing" and (footers := w.footers()):
            w.journal.disk.write(footers[0].sectors)
            w.is_still = True
            w.open_view(0)
            w.is_still = False
            w.lose_power()
            w.write(other, 1, zero=False)
            w.whole_point("all")
            w.apply(0)
            w.end_all()


class LooksBefore(view.PointView):
    """Reads the superblock before the image, and not after."""

    def pread(self, buf: memoryview, offset: int) -> None:
        super()._look_again()
        super().pread(buf, offset)

    def _look_again(self) -> None:
        pass


class LooksAtTheBase(view.PointView):
    """Takes the image as it is until the later point is all of it."""

    def _problem(self, block: Superblock) -> str:
        return "" if block.applying else super()._problem(block)


class TrustsTheNumber(view.PointView):
    """A point of the same number is the same point."""

    def _has_point(self, block: Superblock) -> bool:
        return True


class TrustsTheState(view.PointView):
    """An image that is seeded again is the image."""

    def _problem(self, block: Superblock) -> str:
        return super()._problem(block) if block.state is State.OK else ""


class TrustsTheJournal(view.PointView):
    """Another journal where the journal was is the journal."""

    def _problem(self, block: Superblock) -> str:
        return "" if block.disk_id != self._block.disk_id else super()._problem(block)


class ReadsWhatWasFreed(view.PointView):
    """Does not check data against its CRC."""

    def _data(self, piece: Piece | None) -> bytes | None:
        if piece is None:
            return None
        program = fetch(self._block, piece.place, piece.data_bytes)
        return bytes(run(program, {Side.JOURNAL: self._journal}))


class ForgetsThatTheImageHasIt(view.PointView):
    """Refuses what the journal has no longer, although the image has it."""

    def _data(self, piece: Piece | None) -> bytes | None:
        data = super()._data(piece)
        if data is None and piece is not None:
            raise DeviceError("the journal has it no longer")
        return data


VIEW_MUTANTS = [
    type(f"World{mutant.__name__}", (ViewedWorld,), {"view_class": mutant})
    for mutant in (
        LooksBefore,
        LooksAtTheBase,
        TrustsTheNumber,
        TrustsTheState,
        TrustsTheJournal,
        ReadsWhatWasFreed,
        ForgetsThatTheImageHasIt,
    )
]
