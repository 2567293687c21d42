"""Named bitmaps never miss what guests write, also while a transaction is decided, or fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.disk import Disk
from nbdmirror.errors import CommandError
from nbdmirror.server.bitmaps import Bitmaps, Change, Place
from nbdmirror.state.null_store import NullStore

SIZE, GRANULE = 1 << 20, 4096


class Scene:
    def __init__(self) -> None:
        self.disk = Disk("vda", MemoryDevice(SIZE))
        self.bitmaps = Bitmaps({self.disk: NullStore()})
        self.place = Place(self.disk)

    def add(self, name: str, *, disabled: bool = False) -> DirtyBitmap:
        options: dict[str, Any] = {"persistent": False, "disabled": disabled}
        self.bitmaps.add(self.place, name, GRANULE, **options).commit()
        return self.bitmaps.find(self.place, name).bitmap

    def write(self, granule: int) -> None:
        self.disk.pwrite(b"g" * 512, granule * GRANULE, False)


CHANGES: dict[str, Callable[[Scene], Change]] = {
    "clear": lambda s: s.bitmaps.clear(s.place, "a"),
    "disable": lambda s: s.bitmaps.record(s.place, "a", False),
    "merge": lambda s: s.bitmaps.merge(s.place, "a", [(s.place, "b")]),
    "remove": lambda s: s.bitmaps.remove(s.place, "a"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_that_is_undone_loses_no_write(change: Callable[[Scene], Change]) -> None:
    """Neither one from before the transaction nor one in the middle of it. Nothing else is left
    of the change."""
    scene = Scene()
    a, b = scene.add("a"), scene.add("b")
    scene.write(1)
    b.mark(9 * GRANULE, 1)
    undone = change(scene)
    scene.write(2)
    undone.undo()
    scene.write(3)
    assert a.next_run(0, SIZE) == (GRANULE, 3 * GRANULE)
    assert not a.is_dirty(9 * GRANULE, 1)
    assert scene.bitmaps.find(scene.place, "a").is_recording
    scene.bitmaps.find_idle(scene.place, "a")


def test_a_bitmap_that_was_to_record_does_not_after_the_undo() -> None:
    scene = Scene()
    a = scene.add("a", disabled=True)
    scene.bitmaps.record(scene.place, "a", True).undo()
    scene.write(1)
    assert a.is_empty and not scene.bitmaps.find(scene.place, "a").is_recording


def test_what_is_written_before_the_commit_of_a_clear_is_clean_after_it() -> None:
    """The clear counts from the commit."""
    scene = Scene()
    a = scene.add("a")
    change = scene.bitmaps.clear(scene.place, "a")
    scene.write(1)
    change.commit()
    assert a.is_empty
    scene.write(2)
    assert a.next_run(0, SIZE) == (2 * GRANULE, GRANULE)


def test_commits_in_order_see_each_other() -> None:
    """What one bitmap has is moved to another one, and the first begins anew: a checkpoint."""
    scene = Scene()
    a, b = scene.add("a"), scene.add("b", disabled=True)
    scene.write(1)
    changes = [
        scene.bitmaps.merge(scene.place, "b", [(scene.place, "a")]),
        scene.bitmaps.clear(scene.place, "a"),
        scene.bitmaps.record(scene.place, "b", True),
    ]
    for change in changes:
        change.commit()
    assert a.is_empty
    scene.write(2)
    assert a.next_run(0, SIZE) == (2 * GRANULE, GRANULE)
    assert b.next_run(0, SIZE) == (GRANULE, 2 * GRANULE)


def test_bitmaps_of_other_sizes_are_refused_before_anything_changes() -> None:
    scene, other = Scene(), Disk("vdb", MemoryDevice(2 * SIZE))
    scene.bitmaps = Bitmaps({scene.disk: NullStore(), other: NullStore()})
    scene.add("a")
    scene.bitmaps.add(Place(other), "x", GRANULE, persistent=False, disabled=False).commit()
    with pytest.raises(CommandError, match="different sizes"):
        scene.bitmaps.merge(scene.place, "a", [(Place(other), "x")])
