"""What cannot be believed in a state directory, and disks that are not what they were: what is
refused, and what is copied again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from integration.state.stateparts import GRANULE, SIZE, TOLD, End, begin, ends, finish, settle
from integration.state.test_state_bitmaps import add, bitmaps
from support.clients import connected
from support.fixtures import Identical
from support.images import MiB, assert_identical, make_image
from support.kept import Kept, power_cut, refusal
from support.processes import nbdmirror
from support.servers import QemuNbd


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = (truncate, flip, empty, Path.unlink)


@pytest.mark.guarantee("What is damaged is not believed")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_bitmaps_that_cannot_be_read_are_all_dirty(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path, damage: Callable[[Path], None]
) -> None:
    begin(server, target).wait_ready()
    settle(server)
    server.stop()
    damage(server.state / "vda.bitmaps")
    server.allowed.append(TOLD)
    server.restart()
    assert "everything counts as dirty" in server.stderr
    assert "vda.bitmaps: " in told(server)
    assert finish(server) == SIZE
    identical(disk, target.image)


@pytest.mark.guarantee("What is damaged is not believed")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_log_that_cannot_be_read(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path, damage: Callable[[Path], None]
) -> None:
    """After a power cut it is needed; after a killed process it is not."""
    begin(server, target).wait_ready()
    settle(server)
    server.kill()
    damage(server.state / "vda.intents")
    server.restart()
    with connected(server.uri()) as guest:
        guest.pwrite(b"x" * GRANULE, 0)
    power_cut(server)
    damage(server.state / "vda.intents")
    server.allowed.append(TOLD)
    server.restart()
    assert "everything counts as dirty" in server.stderr
    assert finish(server) == SIZE
    identical(disk, target.image)


@pytest.mark.guarantee("What is damaged is not believed")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_definition_that_cannot_be_read_is_put_aside(
    server: Kept, target: QemuNbd, disk: Path, damage: Callable[[Path], None]
) -> None:
    """Nobody knows then what there was; it is told, and begins anew when asked to."""
    begin(server, target).wait_ready()
    settle(server)
    server.kill()
    damage(server.state / "vda.json")
    server.allowed.append(TOLD)
    qmp = server.restart()
    if damage is not Path.unlink:
        assert "the file is renamed" in server.stderr
        assert (server.state / "vda.json.refused").exists()
    assert qmp.execute("query-block-jobs") == []
    begin(server, target).wait_ready()
    assert finish(server) == SIZE
    assert_identical(disk, target.image)


@pytest.mark.guarantee("Which side is the disk is never ambiguous")
@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_a_record_of_a_pivot_that_cannot_be_read(
    server: Kept, target: QemuNbd, damage: Callable[[Path], None]
) -> None:
    """Which side is the disk is not guessed."""
    begin(server, target).wait_ready()
    server.qmp.complete()
    server.kill()
    damage(server.state / "vda.pivoted")
    said = refusal(server)
    assert "vda.pivoted" in said and "--accept-old-side" in said


@pytest.mark.guarantee("A disk that another program wrote to")
@ends
def test_a_disk_that_somebody_else_has_written_to(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path, end: End
) -> None:
    begin(server, target).wait_ready()
    settle(server)
    end(server)
    later_s = time.time() + (120 if end is power_cut else 20)
    with disk.open("r+b") as file:
        file.seek(9 * MiB)
        file.write(b"somebody else")
    os.utime(disk, (later_s, later_s))  # a while after the server was last alive
    server.allowed.append(TOLD)
    server.restart()
    assert "was written to after" in server.stderr
    assert "was written to after" in told(server)
    assert finish(server) == SIZE
    identical(disk, target.image)


@pytest.mark.guarantee("A disk that another program wrote to")
@pytest.mark.parametrize("by_link", [False, True], ids=["same name", "by a link"])
def test_a_disk_that_was_replaced(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path, by_link: bool
) -> None:
    begin(server, target).wait_ready()
    settle(server)
    server.stop()
    disk.unlink()
    make_image(disk, SIZE, seed=5)
    if by_link:
        link = disk.with_name("link.img")
        link.symlink_to(disk)
        server.disks = [f"vda={link}"]
    server.allowed.append(TOLD)
    server.restart()
    assert "another file is there now" in server.stderr
    assert finish(server) == SIZE
    identical(disk, target.image)


def told(server: Kept) -> str:
    """What the status of the only disk has of its saved state; the command line has that too."""
    (disk,) = server.qmp.execute("x-nbdmirror-query-status")["disks"]
    found = str(disk.get("state-problem", ""))
    shown = nbdmirror("status", "--qmp", server.qmp_path).stdout
    assert (f"not used at the start: {found}; all of its bitmaps" in shown) == bool(found), shown
    return found


@pytest.mark.parametrize("change", [MiB, -MiB], ids=["larger", "smaller"])
@pytest.mark.parametrize("has_mirror", [True, False], ids=["mirror", "bitmap alone"])
def test_a_disk_of_another_size(
    server: Kept, target: QemuNbd, disk: Path, change: int, has_mirror: bool
) -> None:
    """Its mirror cannot go on, and its bitmaps know nothing. The status says so."""
    add(server.qmp)
    if has_mirror:
        begin(server, target).wait_ready()
    server.stop()
    size = SIZE + change
    os.truncate(disk, size)
    server.allowed.append(TOLD)
    qmp = server.restart()
    text = f"the disk had {SIZE} bytes, and has {size} now"
    assert text in server.stderr
    assert told(server) == (text if change > 0 else f"{text}, so its end is missing")
    assert (f"the target has {SIZE} bytes, the disk {size}" in server.stderr) == has_mirror
    assert qmp.execute("query-block-jobs") == []
    assert bitmaps(server)["b"]["count"] == size
    server.stop()
    server.restart()
    assert told(server) == "", "this start has found what the last one left"


def test_another_disk_of_the_same_name_is_refused(
    server: Kept, target: QemuNbd, folder: Path, disk: Path
) -> None:
    """Its mirror would go on, onto the target of the first one."""
    begin(server, target).wait_ready()
    server.stop()
    other = make_image(folder / "other.img", SIZE, seed=8)
    server.disks = [f"vda={other}"]
    said = refusal(server)
    assert f"is of {disk}, not of {other}" in said and "another name" in said
    disk.rename(folder / "moved.img")
    server.disks = [f"vda={folder / 'moved.img'}"]  # the same file by another name is the same
    server.restart()
    assert finish(server) == 0
    assert_identical(folder / "moved.img", target.image)
