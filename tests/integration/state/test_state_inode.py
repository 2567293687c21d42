"""A disk's file is deleted, and a new file gets its inode: that is another disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.state.stateparts import SIZE, End, begin, ends, finish, settle
from support.fixtures import Start
from support.images import assert_identical, make_image, make_noise
from support.kept import Kept, refusal
from support.mounts import formatted, mounted
from support.servers import QemuNbd


@pytest.fixture
def place(folder: Path) -> Iterator[Path]:
    """On a file system that uses the first inode that is free."""
    with mounted("ext4", "loop", formatted("ext4", folder / "ext4.img")) as place:
        yield place


@pytest.fixture
def old(place: Path) -> Path:
    return make_image(place / "old.img", SIZE)


@pytest.fixture
def kept(start: Start, folder: Path, old: Path) -> Kept:
    return start(Kept(folder, old))


def replaced(old: Path, name: str) -> Path:
    """The new disk, with the inode of the old one, and as old as that one for who asks its time of
    change."""
    before = old.stat()
    old.unlink()
    new = make_noise(old.with_name(name), SIZE, 5)
    assert new.stat().st_ino == before.st_ino, "the inode is not used again"
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    return new


@ends
def test_the_new_disks_mirror_does_not_go_to_the_old_ones_copy(
    kept: Kept, target: QemuNbd, old: Path, end: End
) -> None:
    begin(kept, target).wait_ready()
    settle(kept)
    end(kept)
    copy = target.image.read_bytes()
    new = replaced(old, "new.img")
    kept.disks = [f"vda={new}"]
    assert f"is of {old}, not of {new}" in refusal(kept)
    assert target.image.read_bytes() == copy


@ends
def test_a_new_file_under_the_same_path_is_copied(
    kept: Kept, target: QemuNbd, old: Path, end: End
) -> None:
    begin(kept, target).wait_ready()
    settle(kept)
    end(kept)
    new = replaced(old, old.name)
    kept.allowed.append("counts as dirty")
    kept.restart()
    assert finish(kept) == SIZE
    kept.stop()
    assert_identical(new, target.image)
    assert "another file is there now" in kept.stderr


def test_a_new_disk_is_no_old_side(kept: Kept, target: QemuNbd, old: Path) -> None:
    """Nor does it keep the disk that has moved from its server's start."""
    begin(kept, target).wait_ready()
    kept.qmp.complete()
    kept.stop()
    new = replaced(old, "new.img")
    kept.disks = [f"vda={target.uri()}", f"vdb={new}"]
    kept.restart()
