"""Image and journal of several disks of one guest, in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from unit.points.pointparts import SECOND_NS, FarSide

from nbdmirror.points.format import BLOCK_BYTES, JournalError, State
from nbdmirror.points.group_recovery import Instant, recover_group
from nbdmirror.points.recovery import Recovered

BLOCKS = (0, 24 << 10, 60 << 10)


class Guest:
    """Far sides of several disks of one guest. `moments`: what the disks were, by the number of the
    group."""

    def __init__(self, disks: int = 2) -> None:
        self.fars: list[FarSide] = []
        self.moments: dict[int, list[bytes]] = {}
        self.now_ns = 0
        for name in "abc"[:disks]:
            far = FarSide()
            far.stamps = itertools.count(1000 * ord(name))
            far.image.description, far.journal.description = f"image {name}", f"journal {name}"
            far.connect()
            far.fill(0, len(far.disk))
            far.seed()
            self.fars.append(far)

    def point(self, far: FarSide, group: int = 0, name: str = "") -> None:
        self.point_of([far], group, name)

    def moment(self, group: int, name: str = "") -> None:
        """Of all disks."""
        self.point_of(self.fars, group, name)
        self.moments[group] = [bytes(far.disk) for far in self.fars]

    def point_of(self, fars: Sequence[FarSide], group: int, name: str = "") -> None:
        self.now_ns += SECOND_NS
        for far in fars:
            for at in BLOCKS:
                far.fill(at, BLOCK_BYTES)
            far.writer.begin(self.now_ns, bytes_max=BLOCK_BYTES * 3, name=name, group=group)
            for at in BLOCKS:
                far.send(at, BLOCK_BYTES)
            far.commit()

    def recover(self, wanted: str | None = None) -> list[Recovered]:
        self.told: list[Instant] = []
        return recover_group(
            [far.sides for far in self.fars],
            wanted=wanted,
            now_ns=99 * SECOND_NS,
            on_instant=lambda journals, instant: self.told.append(instant),
        )

    def assert_is(self, group: int) -> None:
        for far, content in zip(self.fars, self.moments[group], strict=True):
            assert bytes(far.image.data) == content
            assert far.read().superblock.state is State.PROMOTED
            assert [point.group for point in far.read().points] == [group]

    def everything(self) -> list[bytes]:
        return [bytes(one.data) for far in self.fars for one in (far.image, far.journal)]

    def refuses(self, message: str, wanted: str | None = None) -> str:
        before = self.everything()
        with pytest.raises(JournalError, match=message) as caught:
            self.recover(wanted)
        assert self.everything() == before
        assert not self.told
        return str(caught.value)


def a_guest(disks: int = 2) -> Guest:
    """Moments 11 (named), 12 and 13, with points of single disks between them."""
    guest = Guest(disks)
    guest.point(guest.fars[0])
    guest.moment(11, "nightly")
    guest.point(guest.fars[-1])
    guest.moment(12)
    guest.moment(13)
    guest.point(guest.fars[0], 14)
    guest.point(guest.fars[-1])
    return guest
