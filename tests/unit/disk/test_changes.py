"""Changes: which of two bitmaps has what may differ, and what a killed process leaves of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.changes import Changes
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.fine import FineBitmap
from nbdmirror.disk.frozen import Frozen
from nbdmirror.disk.latency import Latency
from nbdmirror.disk.saved import SavedGranules
from nbdmirror.state.shared_memory import ShmDirectory

GRANULE = 4096
SIZE = 64 * GRANULE


def freeze(covered: FineBitmap, done: DirtyBitmap) -> Frozen:
    return Frozen(
        covered,
        done,
        SavedGranules(1 << 20),
        on_broken=lambda: None,
        on_saved=lambda: None,
        latency=Latency(),
    )


def cut(changes: Changes) -> Frozen:
    changes.prepare()
    changes.disk.ledger.close_gate(lambda: None, holds_flushes=False)
    frozen = changes.cut(freeze)
    changes.disk.ledger.open_gate()
    return frozen


def granules(bitmap: DirtyBitmap) -> set[int]:
    return {at // GRANULE for at in range(0, SIZE, GRANULE) if bitmap.is_dirty(at, 1)}


@pytest.fixture
def memory() -> Iterator[ShmDirectory]:
    memory = ShmDirectory.create(uuid.uuid4().hex)
    yield memory
    memory.discard()


def left(memory: ShmDirectory) -> set[int]:
    """What the start after a kill finds."""
    found = DirtyBitmap(SIZE, GRANULE)
    for bits in memory.bits_of("points"):
        found.merge_bytes(bits)
    return granules(found)


def test_a_killed_process_leaves_all_that_may_differ(memory: ShmDirectory) -> None:
    disk = Disk("disk", MemoryDevice(SIZE))
    changes = Changes(disk, GRANULE, lambda *sizes: memory.bitmap("points", *sizes))
    changes.begin()

    def write(granule: int) -> None:
        disk.pwrite(b"x", granule * GRANULE, False)

    def check(*wanted: int) -> None:
        assert granules(changes.may_differ()) == left(memory) == set(wanted)

    write(1)
    check(1)
    cut(changes)
    write(2)
    check(1, 2)
    changes.committed()
    check(2)
    cut(changes)
    write(3)
    write(2)
    changes.broken()
    check(2, 3)
    assert granules(cut(changes).covered) == {2, 3}
    changes.committed()
    check()
    assert len(memory.bits_of("points")) == 2, "bitmaps are used again, and are not made each time"
    changes.end()
    write(4)
    assert not memory.bits_of("points")


def test_a_cut_begins_with_details_and_without_old_ones() -> None:
    disk = Disk("disk", MemoryDevice(SIZE))
    changes = Changes(disk, 8 * GRANULE, unit=GRANULE)
    changes.begin()
    for _ in range(2):
        changes.look()
    for granule in (1, 2, 1):
        disk.pwrite(b"x", granule * GRANULE, False)
        frozen = cut(changes)
        assert frozen.covered.parts_in(0, 8 * GRANULE) == ((granule * GRANULE, GRANULE),)
        changes.committed()
        assert changes.dirty.is_empty


def test_parts_of_a_broken_point_are_sent_again_as_whole_granules() -> None:
    disk = Disk("disk", MemoryDevice(SIZE))
    changes = Changes(disk, 8 * GRANULE, unit=GRANULE)
    changes.begin()
    for _ in range(2):
        changes.look()
    disk.pwrite(b"x", 0, False)
    cut(changes)
    changes.broken()
    disk.pwrite(b"x", GRANULE, False)
    assert cut(changes).covered.parts_in(0, 8 * GRANULE) is None


def test_guests_that_write_very_often_make_a_point_coarse() -> None:
    """So does one that is cut while everything is coarse: its successor has no details either."""
    disk = Disk("disk", MemoryDevice(SIZE))
    changes = Changes(disk, 8 * GRANULE, unit=GRANULE)
    changes.begin()  # and nobody has looked
    disk.pwrite(b"x", 0, False)
    assert cut(changes).covered.parts_in(0, 8 * GRANULE) is None
    changes.committed()
    changes.look()
    disk.pwrite(b"x", 0, False)
    assert cut(changes).covered.parts_in(0, 8 * GRANULE) is None
