"""What is remembered of a disk's file over reboots, moves and clocks that are set."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdmirror.state.bitmap_snapshot import KIND_BITMAPS, BitmapSnapshot
from nbdmirror.state.disk_file import (
    ALIVE_BYTES,
    DiskIdentity,
    LastSeen,
    check_unchanged,
    check_unchanged_since_killed,
    check_unchanged_since_saved,
    write_alive,
    write_seen,
)
from nbdmirror.state.disk_record import KIND_DEFINITION, DiskRecord
from nbdmirror.state.recovery import KIND_PIVOTED, PivotRecord, record_id
from nbdmirror.state.sealed_files import StateError, seal

NOW_S = 1_700_000_000.0
HOUR_S = 3600.0


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 4096)
    os.utime(path, (NOW_S, NOW_S))
    return path


def identity(disk: Path) -> DiskIdentity:
    return DiskIdentity.of(str(disk), 4096)


def after_a_reboot(before: DiskIdentity) -> DiskIdentity:
    return replace(before, device=before.device + 7, boot="another")


def test_a_file_is_the_same_at_the_next_boot_whatever_its_device_is_called(disk: Path) -> None:
    before = identity(disk)
    assert before.filesystem, "a file system without an id: this test says nothing here"
    moved = replace(after_a_reboot(before), source="/elsewhere/disk.img")
    assert before.is_one_file(moved) and before.is_same(moved)


def test_a_number_of_a_device_says_nothing_if_no_boot_is_known(disk: Path) -> None:
    """Without /proc: the number may be from before a start of the host."""
    before = DiskIdentity("/dev/one", 0, number=7)
    assert before.is_one_file(replace(before, source="/dev/other")) is None
    one_boot = replace(before, boot="a")
    assert one_boot.is_one_file(replace(one_boot, source="/dev/other")) is True


def test_a_file_is_no_device(disk: Path) -> None:
    """Whatever boot that was; and two devices at one path may be one: LVM numbers them anew."""
    file, device = identity(disk), DiskIdentity(str(disk), 4096, boot="a", number=7)
    for boot in ("", "a", file.boot):
        there = replace(device, boot=boot)
        assert file.is_one_file(there) is False and there.is_one_file(file) is False
    assert device.is_one_file(replace(device, number=8)) is None


def test_the_number_of_a_device_is_another_ones_at_the_next_boot(disk: Path) -> None:
    before = identity(disk)
    other = replace(before, source="/other.img", boot="another", filesystem="ffff")
    assert before.is_one_file(other) is None and not before.is_same(other)


def test_the_number_of_a_device_counts_less_than_the_ids_of_file_systems(disk: Path) -> None:
    """It is another one's at the next boot, which may not be known, and when a file system is
    mounted where another one was."""
    for boot in ("", "a"):
        before = replace(identity(disk), boot=boot)
        other = replace(before, source="/other.img", filesystem="ffff")
        assert before.is_one_file(other) is None and not before.is_same(other)
        assert before.is_one_file(replace(other, filesystem=before.filesystem)) is True


def test_without_ids_of_file_systems_the_boot_decides(disk: Path) -> None:
    """Where a record knows none, an old side that is served is the worse mistake."""
    before = replace(identity(disk), filesystem="", boot="a")
    assert before.is_one_file(replace(before, source="/other.img")) is True
    assert before.is_one_file(replace(before, boot="")) is None
    assert replace(before, boot="").is_one_file(replace(before, boot="")) is True


def test_an_inode_that_is_used_again_is_another_file(disk: Path) -> None:
    """A deleted file's inode is often that of the next one. Records of older versions tell no time
    of birth."""
    before = identity(disk)
    assert before.birth_ns, "a file system without times of birth: this test says nothing here"
    os.utime(disk, (NOW_S + 1, NOW_S + 1))
    disk.write_bytes(b"y" * 4096)
    assert identity(disk.rename(disk.with_name("moved.img"))).birth_ns == before.birth_ns
    for now in (before, after_a_reboot(before)):
        other = replace(now, birth_ns=before.birth_ns + 1, source="/other.img")
        assert before.is_one_file(other) is False and not before.is_same(other)
        older = replace(other, birth_ns=0)
        assert before.is_one_file(older) is True and older.is_one_file(before) is True


def test_what_cannot_be_known_is_not_guessed(disk: Path) -> None:
    """A file system without an id, at the next boot."""
    before = replace(identity(disk), filesystem="")
    assert before.is_one_file(after_a_reboot(before)) is None
    assert before.is_one_file(replace(before, inode=before.inode + 1)) is False
    assert before.is_one_file(DiskIdentity("nbd://host/x", 4096)) is None


def test_a_hard_link_and_a_bind_mount_are_the_file(disk: Path) -> None:
    link = disk.with_name("link.img")
    link.hardlink_to(disk)
    assert identity(disk).is_same(identity(link))


def test_a_file_system_whose_id_is_its_device_has_none(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As XFS and FAT: at the next boot the id may be another's."""
    device = disk.stat().st_dev
    major, minor = os.major(device), os.minor(device)
    number = SimpleNamespace(f_fsid=minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)
    monkeypatch.setattr(os, "statvfs", lambda path: number)
    assert identity(disk).inode and not identity(disk).filesystem


# Times.


def noted(seen_s: float, mtime_s: float, alive_s: float) -> LastSeen:
    memory = bytearray(ALIVE_BYTES)
    write_alive(memoryview(memory), alive_s)
    write_seen(memoryview(memory), seen_s, int(mtime_s) * 10**9)
    found = LastSeen.from_bytes(bytes(memory))
    assert found is not None
    return found


@pytest.mark.parametrize("step_s", [-HOUR_S, 0.0, HOUR_S, 20 * 365 * 24 * HOUR_S])
def test_an_idle_disk_is_believed_whatever_was_done_to_the_clock(disk: Path, step_s: float) -> None:
    """The last write was before the clock was set."""
    last = noted(NOW_S + step_s, NOW_S, NOW_S + step_s + 1)
    check_unchanged_since_killed(str(disk), last, was_idle=False)
    check_unchanged_since_saved(str(disk), NOW_S + step_s, int(NOW_S) * 10**9)


def test_what_the_server_wrote_after_its_last_look_is_its_own(disk: Path) -> None:
    last = noted(NOW_S - 1, NOW_S - HOUR_S, NOW_S - 0.5)
    check_unchanged_since_killed(str(disk), last, was_idle=False)


@pytest.mark.parametrize("changed_s", [60.0, -60.0, -HOUR_S])
def test_a_time_of_change_that_the_server_cannot_have_made(disk: Path, changed_s: float) -> None:
    """Later, or set back: by `touch`, a backup's restore, or a clock that was set back while the
    server was down."""
    last = noted(NOW_S, NOW_S - 10, NOW_S + 1)
    os.utime(disk, (NOW_S, NOW_S + changed_s))
    with pytest.raises(StateError, match="was written to after"):
        check_unchanged_since_killed(str(disk), last, was_idle=False)


def test_a_guest_that_was_idle_changed_nothing(disk: Path) -> None:
    """So any change since the last look is somebody else's, however soon it came."""
    last = noted(NOW_S - 0.5, NOW_S - 1, NOW_S - 0.2)
    check_unchanged_since_killed(
        str(disk), replace(last, mtime_ns=int(NOW_S) * 10**9), was_idle=True
    )
    with pytest.raises(StateError, match="was written to after"):
        check_unchanged_since_killed(str(disk), last, was_idle=True)
    check_unchanged_since_killed(str(disk), last, was_idle=False)
    older = replace(last, is_exact=False)
    check_unchanged_since_killed(str(disk), older, was_idle=True)


def test_after_a_power_cut_an_older_time_is_no_sign(disk: Path) -> None:
    """The last writes, and the time of them, may be lost."""
    check_unchanged_since_saved(str(disk), NOW_S + HOUR_S, int(NOW_S + HOUR_S) * 10**9)
    with pytest.raises(StateError, match="was written to after"):
        check_unchanged_since_saved(str(disk), NOW_S - 120, int(NOW_S - 130) * 10**9)


def test_after_an_orderly_end_the_time_is_exact(disk: Path) -> None:
    check_unchanged(str(disk), disk.stat().st_mtime_ns)
    with pytest.raises(StateError, match="was written to after"):
        check_unchanged(str(disk), disk.stat().st_mtime_ns - 1)


def test_older_memory_notes_only_that_the_server_lived(disk: Path) -> None:
    memory = bytearray(ALIVE_BYTES)
    write_alive(memoryview(memory), NOW_S)
    last = LastSeen.from_bytes(bytes(memory[:8]))
    assert last == LastSeen(NOW_S)
    check_unchanged_since_killed(str(disk), last, was_idle=False)
    assert LastSeen.from_bytes(b"") is None


# Files of older versions.

OLD_IDENTITY = {"source": "/srv/disk.img", "size": 4096, "device": 5, "inode": 9}


def old_file(kind: str, said: object) -> bytes:
    return seal(kind, json.dumps(said).encode())


def test_files_of_an_older_version_are_read() -> None:
    said = {
        "disk_id": "0" * 32, "identity": OLD_IDENTITY, "memory": "", "clean_mtime_ns": 7,
        "mirror": None, "bitmaps": [],
    }  # fmt: skip
    definition = DiskRecord.from_bytes(old_file(KIND_DEFINITION, said))
    assert definition.identity == DiskIdentity("/srv/disk.img", 4096, 5, 9)
    said = {"truth": "nbd://b/vda", "left": [OLD_IDENTITY], "time_s": NOW_S}
    pivoted = PivotRecord.from_bytes(old_file(KIND_PIVOTED, said))
    assert (pivoted.size, pivoted.left) == (0, (definition.identity,))
    content = pivoted.to_bytes()
    assert record_id(replace(pivoted, has_ended=True).to_bytes()) == record_id(content)
    assert b"birth" not in content, "else the same pivot would get another ID"
    head = json.dumps({"disk": "0" * 32, "time": NOW_S, "bitmaps": {}}).encode()
    saved = BitmapSnapshot.from_bytes(seal(KIND_BITMAPS, head + b"\n"), {})
    assert (saved.time_s, saved.mtime_ns) == (NOW_S, 0)


Now = Callable[[DiskIdentity], DiskIdentity]


@pytest.mark.parametrize(
    ("now", "is_one"),
    [(lambda one: one, True), (lambda one: replace(one, device=6), None)],
    ids=["the same number", "another number"],
)
def test_an_older_record_knows_no_boot(now: Now, is_one: bool | None) -> None:
    before = DiskIdentity("/srv/disk.img", 4096, 5, 9)
    present = now(replace(before, boot="b", filesystem="f", source="/srv/other.img"))
    assert before.is_one_file(present) is is_one
