"""The journal as a job sees it: when its space can be used again."""

from __future__ import annotations

from unit.points.pointparts import PromptExport, with_points

from nbdmirror.devices.base import Done
from nbdmirror.points.requests import Side
from nbdmirror.server.far_side import JournalSide


class SlowTrims(PromptExport):
    """Trims wait until the test ends them."""

    trims: list[Done]

    def start_trim(self, offset: int, length: int, done: Done) -> None:
        self.trims.append(done)


def test_a_point_is_applied_when_its_space_is_free() -> None:
    """A job stops for good if a point does not fit although everything is applied."""
    far = with_points(2)
    export = SlowTrims(far.journal)
    export.trims = []
    side = JournalSide(far.writer, {**far.exports, Side.JOURNAL: export}, lambda: 0, lambda _: None)
    ended: list[BaseException | None] = []
    side.apply(ended.append, hands_over=False)
    assert export.trims and not ended
    assert far.read().superblock.base.sequence == side.newest
    assert not side.is_applied
    used_bytes = side.room().used_bytes
    for done in export.trims:
        done(None)
    assert ended == [None]
    assert side.is_applied
    assert side.room().used_bytes < used_bytes
