"""Named bitmaps never miss what guests write, also while a transaction is decided, or fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
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


Sequence = Callable[[Scene], list[Change]]


def merge(s: Scene, into: str, source: str) -> Change:
    return s.bitmaps.merge(s.place, into, [(s.place, source)])


def clear(s: Scene, name: str) -> Change:
    return s.bitmaps.clear(s.place, name)


def record(s: Scene, name: str, recording: bool) -> Change:
    return s.bitmaps.record(s.place, name, recording)


TRANSACTIONS: dict[str, Sequence] = {
    "merge and clear": lambda s: [merge(s, "b", "a"), clear(s, "a")],
    "merge, clear and merge": lambda s: [merge(s, "b", "a"), clear(s, "a"), merge(s, "c", "a")],
    "merge twice and clear": lambda s: [merge(s, "b", "a"), merge(s, "c", "a"), clear(s, "a")],
    "clear, merge and clear": lambda s: [clear(s, "b"), merge(s, "b", "a"), clear(s, "a")],
    "merge, clear and clear": lambda s: [merge(s, "b", "a"), clear(s, "a"), clear(s, "c")],
    "hand over": lambda s: [record(s, "a", False), record(s, "b", True)],
    "freeze": lambda s: [record(s, "a", False), merge(s, "b", "a"), record(s, "c", True)],
    "hand over at last": lambda s: [
        merge(s, "b", "a"), record(s, "a", False), clear(s, "c"), record(s, "c", True)
    ],
    "merge, change and clear": lambda s: [merge(s, "b", "a"), merge(s, "a", "c"), clear(s, "a")],
    "merge, change and freeze": lambda s: [
        merge(s, "b", "a"), merge(s, "a", "c"), record(s, "a", False)
    ],
    "off and on": lambda s: [record(s, "a", False), merge(s, "b", "a"), record(s, "a", True)],
    "merge and remove": lambda s: [
        merge(s, "b", "a"), s.bitmaps.remove(s.place, "a"), record(s, "b", True)
    ],
}  # fmt: skip
"""`a` records and has a mark, `c` has another one and does not record, `b` is clean and does not
either."""

BEFORE, OTHER, FIRST = 200, 201, 1
"""The granules of the marks, and the first one that a guest writes after that."""


def three() -> Scene:
    scene = Scene()
    for name in ("a", "b", "c"):
        scene.add(name, disabled=name != "a")
    scene.write(BEFORE)
    scene.bitmaps.find(scene.place, "c").bitmap.mark(OTHER * GRANULE, 1)
    return scene


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("sequence", TRANSACTIONS.values(), ids=TRANSACTIONS)
def test_what_a_guest_writes_between_the_commits_of_a_transaction(
    sequence: Sequence, moment: int
) -> None:
    """In QEMU no guest writes there. Here it does, and one of the bitmaps has the write."""
    scene = three()
    changes = sequence(scene)
    with scene.bitmaps.one_moment():
        for number, change in enumerate(changes):
            if number == moment:
                scene.write(FIRST)
            change.commit()
        if moment >= len(changes):
            scene.write(FIRST)
    left = scene.bitmaps.of(scene.place)
    assert any(one.bitmap.is_dirty(FIRST * GRANULE, 1) for one in left)
    for one in left:
        dirty = {g for g in range(SIZE // GRANULE) if one.bitmap.is_dirty(g * GRANULE, 1)}
        assert dirty <= {FIRST, BEFORE, OTHER}


def test_a_write_between_a_merge_and_the_end_of_its_source_is_in_the_target() -> None:
    """Its source may be removed later, since it is in the target."""
    ends: list[Callable[[Scene], Change]] = [CHANGES["disable"], CHANGES["remove"]]
    for end in ends:
        scene = Scene()
        scene.add("a")
        b = scene.add("b", disabled=True)
        first, second = merge(scene, "b", "a"), end(scene)
        with scene.bitmaps.one_moment():
            first.commit()
            scene.write(FIRST)
            second.commit()
            scene.write(FIRST + 1)
        assert b.next_run(0, SIZE) == (FIRST * GRANULE, 2 * GRANULE)
        scene.write(FIRST + 4)
        assert not b.is_dirty((FIRST + 4) * GRANULE, 1)


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("sequence", TRANSACTIONS.values(), ids=TRANSACTIONS)
def test_without_a_guest_a_transaction_does_what_its_actions_do_alone(
    sequence: Sequence, goes_on: bool
) -> None:
    found = []
    for one_moment in (True, False):
        scene = three()
        with scene.bitmaps.one_moment() if one_moment else nullcontext():
            for change in sequence(scene):
                change.commit()
        if goes_on:
            scene.write(FIRST)
        there = scene.bitmaps.of(scene.place)
        found.append([(b.name, b.is_recording, b.bitmap.to_bytes()) for b in there])
    assert found[0] == found[1]


def test_bitmaps_of_other_sizes_are_refused_before_anything_changes() -> None:
    scene, other = Scene(), Disk("vdb", MemoryDevice(2 * SIZE))
    scene.bitmaps = Bitmaps({scene.disk: NullStore(), other: NullStore()})
    scene.add("a")
    scene.bitmaps.add(Place(other), "x", GRANULE, persistent=False, disabled=False).commit()
    with pytest.raises(CommandError, match="different sizes"):
        scene.bitmaps.merge(scene.place, "a", [(Place(other), "x")])
