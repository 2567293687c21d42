"""A reboot, or a file system that is mounted again: what is remembered of a disk is of this file,
not of the number that its device had; and a disk keeps its size on a larger target."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
from integration.state.stateparts import GRANULE, SIZE, End, begin, ends, finish, settle
from integration.state.test_state_bitmaps import add, bitmaps
from support.clients import connected
from support.fixtures import Start
from support.images import MiB, assert_identical, make_empty, make_image, make_noise
from support.kept import Kept, power_cut, refusal
from support.mounts import ON_DISK, loop_device
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.state.disk_file import LastSeen
from nbdmirror.state.journal import is_untouched
from nbdmirror.state.recovery import ALIVE, JOURNAL
from nbdmirror.state.sealed_files import seal, unseal


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=ON_DISK, prefix="nbdmirror-test-") as folder:
        yield Path(folder)


Mount = Callable[[Path], AbstractContextManager[None]]


@pytest.fixture
def mounted(place: Path) -> Iterator[Mount]:
    """At `place`, each time by another device: those before stay attached."""
    with ExitStack() as devices:

        @contextmanager
        def mount(image: Path) -> Iterator[None]:
            device = devices.enter_context(loop_device(image))
            subprocess.run(["mount", device, str(place)], check=True)
            try:
                yield
            finally:
                subprocess.run(["umount", str(place)], check=True)

        yield mount


@ends
def test_a_file_system_with_another_number(
    start: Start, folder: Path, target: QemuNbd, place: Path, mounted: Mount, end: End
) -> None:
    image = make_empty(folder / "fs.img", 3 * SIZE)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    with mounted(image):
        disk = make_image(place / "disk.img", SIZE)
        before = disk.stat().st_dev
        server = start(Kept(folder, disk))
        add(server.qmp)
        begin(server, target).wait_ready()
        with connected(server.uri()) as guest:
            guest.pwrite(b"x" * GRANULE, 5 * MiB)
            guest.flush()
        settle(server)
        end(server)
    with mounted(image):
        assert disk.stat().st_dev != before
        server.restart()
        count = int(str(bitmaps(server)["b"]["count"]))
        assert count == GRANULE or (end is power_cut and count <= 2 * MiB)
        assert finish(server) <= (2 * MiB if end is power_cut else GRANULE)
        server.stop()
        assert_identical(disk, target.image)


def test_the_old_side_after_a_reboot_under_another_name(
    start: Start, folder: Path, target: QemuNbd, place: Path, mounted: Mount
) -> None:
    """It is not the disk any more, whatever its device's number and its own name are."""
    image = make_empty(folder / "fs.img", 3 * SIZE)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    with mounted(image):
        server = start(Kept(folder, make_image(place / "disk.img", SIZE)))
        begin(server, target).wait_ready()
        server.qmp.complete()
        server.kill()
    with mounted(image):
        moved = (place / "disk.img").rename(place / "other.img")
        server.disks = [f"vda={moved}"]
        said = subprocess.run(server.argv(), capture_output=True, text=True, check=False)
        assert said.returncode == 1 and "is not the disk any more" in said.stderr


@ends
def test_a_file_that_was_moved_and_written_to(
    start: Start, server: Kept, target: QemuNbd, disk: Path, end: End
) -> None:
    """The file under its new name is looked at, not the name that is gone."""
    begin(server, target).wait_ready()
    settle(server)
    end(server)
    moved = disk.rename(disk.with_name("moved.img"))
    subprocess.run(["touch", "-d", "now + 1 hour", str(moved)], check=True)
    server.disks = [f"vda={moved}"]
    server.allowed.append("counts as dirty")
    server.restart()
    assert "was written to after" in server.stderr
    assert finish(server) == SIZE
    assert_identical(moved, target.image)


# Somebody else writes while the server is down.


def be_seen(server: Kept, disk: Path) -> None:
    """The server has looked at its file after the guests' last write."""
    memory = Path(str(server.definition()["memory"]))

    def is_seen() -> bool:
        last = LastSeen.from_bytes((memory / ALIVE).read_bytes())
        is_idle = is_untouched((memory / JOURNAL).read_bytes())
        return bool(last and is_idle and last.mtime_ns == disk.stat().st_mtime_ns)

    wait_until(is_seen, "the server has looked at its disk")


def write_a_granule(uri: str, offset: int) -> None:
    with connected(uri) as guest:
        guest.pwrite(b"x" * GRANULE, offset)
        guest.flush()


def rescue(server: Kept, disk: Path, by: str) -> None:
    """What people do to have their disk back at once: a write, by another program, or by a server
    of ours that does not know of the mirror."""
    if by == "another program":
        with disk.open("r+b") as file:
            file.seek(3 * MiB)
            file.write(b"rescue")
        return
    name, directory = ("vdq", server.state) if by == "another name" else ("vda", None)
    options = ("--state-dir", str(directory)) if directory else ()
    with Nbdmirror(server.folder, f"{name}={disk}", options=options) as other:
        write_a_granule(other.uri(), 3 * MiB)


@pytest.mark.parametrize("end", [Kept.kill, Kept.stop], ids=["killed", "orderly end"])
@pytest.mark.parametrize("by", ["another program", "another name", "a server without state"])
def test_a_disk_that_somebody_else_wrote_to_at_once(
    server: Kept, target: QemuNbd, disk: Path, end: End, by: str
) -> None:
    """However soon that was, if guests were idle: or the mirror would complete without it."""
    begin(server, target).wait_ready()
    write_a_granule(server.uri(), 5 * MiB)
    be_seen(server, disk)
    end(server)
    rescue(server, disk, by)
    server.allowed.append("counts as dirty")
    server.restart()
    assert finish(server) == SIZE
    server.stop()
    assert_identical(disk, target.image)


@pytest.mark.parametrize("end", [Kept.kill, Kept.stop], ids=["killed", "orderly end"])
def test_a_block_device_under_another_name(
    start: Start, folder: Path, target: QemuNbd, end: End
) -> None:
    """Its time of change tells nothing; the state directory knows whose device that was."""
    with loop_device(make_image(folder / "disk.img", SIZE)) as device:
        server = start(Kept(folder, device))
        begin(server, target).wait_ready()
        settle(server)
        end(server)
        rescue(server, Path(device), "another name")
        server.allowed.append("counts as dirty")
        server.restart()
        assert finish(server) == SIZE
        server.stop()
        assert_identical(Path(device), target.image)


@ends
@pytest.mark.parametrize("becomes", ["a device", "a file"])
def test_a_path_that_leads_to_another_kind_of_storage(
    start: Start, folder: Path, target: QemuNbd, end: End, becomes: str
) -> None:
    """As after a move to LVM: the content was never compared, and its time tells nothing."""
    file, path = make_noise(folder / "file.img", SIZE, 7), folder / "vda"
    os.utime(file, (0, 0))
    with loop_device(make_image(folder / "device.img", SIZE)) as device:
        places = [file, Path(device)]
        if becomes == "a file":
            places.reverse()
        path.symlink_to(places[0])
        server = start(Kept(folder, path))
        begin(server, target).wait_ready()
        settle(server)
        end(server)
        path.unlink()
        path.symlink_to(places[1])
        server.allowed.append("counts as dirty")
        server.restart()
        assert finish(server) == SIZE
        server.stop()
        assert_identical(places[1], target.image)


# An old side.


def test_the_file_below_a_device_that_was_the_disk(
    start: Start, folder: Path, target: QemuNbd
) -> None:
    """After a pivot and a reboot the file has another device, or none: it is the old side."""
    image = make_image(folder / "disk.img", SIZE)
    with loop_device(image) as device:
        server = start(Kept(folder, device))
        begin(server, target).wait_ready()
        server.qmp.complete()
        server.stop()
    old = "is the old side of the disk vda"
    server.disks = [f"other={image}"]
    assert old in refusal(server)
    with loop_device(make_noise(folder / "another.img", SIZE)), loop_device(image) as device:
        server.disks = [f"other={device}"]
        assert old in refusal(server)
    server.disks = [f"other={folder / 'another.img'}"]
    server.restart()


def test_an_export_of_the_file_that_was_the_disk(
    start: Start, folder: Path, target: QemuNbd
) -> None:
    image = make_image(folder / "disk.img", SIZE)
    server = start(Kept(folder, image))
    begin(server, target).wait_ready()
    server.qmp.complete()
    server.stop()
    server.disks = [f"other={start(QemuNbd(folder, image)).uri()}"]
    assert "is the old side of the disk vda" in refusal(server)
    another = start(QemuNbd(folder, make_noise(folder / "another.img", SIZE)))
    server.disks = [f"other={another.uri()}"]
    server.restart()


# A larger target.


def pivot_to_larger(start: Start, folder: Path, server: Kept) -> QemuNbd:
    larger = start(QemuNbd(folder, make_empty(folder / "larger.img", SIZE + 4 * MiB)))
    qmp = server.qmp
    qmp.add_target("t", larger)
    allow = {"x-nbdmirror-allow-larger-target": True}
    qmp.start_mirror("t", device="vda", granularity=GRANULE, **allow)
    qmp.wait_ready()
    qmp.complete()
    server.disks = [f"vda={larger.uri()}"]
    return larger


def size_of(server: Nbdmirror) -> int:
    with connected(server.uri()) as guest:
        return int(guest.get_size())


@ends
def test_the_disk_keeps_its_size_on_a_larger_target(
    start: Start, folder: Path, server: Kept, disk: Path, end: End
) -> None:
    """And its bitmaps what they know, and there is a way home."""
    add(server.qmp)
    larger = pivot_to_larger(start, folder, server)
    settle(server)
    end(server)
    server.restart()
    assert size_of(server) == SIZE
    assert int(str(bitmaps(server)["b"]["count"])) <= (MiB if end is power_cut else 0)
    with connected(server.uri()) as guest:
        guest.pwrite(b"at the end", SIZE - 10)
    home = start(QemuNbd(folder, disk))
    begin(server, home).wait_ready()
    server.qmp.complete()
    server.stop()
    home.stop()
    with disk.open("rb") as old, larger.image.open("rb") as new:
        assert old.read() == new.read(SIZE)


def test_a_second_pivot_and_restart_keeps_it_too(start: Start, folder: Path, server: Kept) -> None:
    pivot_to_larger(start, folder, server)
    server.kill()
    server.restart()
    third = start(QemuNbd(folder, make_empty(folder / "third.img", SIZE + 8 * MiB)))
    allow = {"x-nbdmirror-allow-larger-target": True}
    server.qmp.add_target("third", third)
    server.qmp.start_mirror("third", device="vda", **allow)
    server.qmp.wait_ready()
    server.qmp.complete()
    server.stop()
    server.disks = [f"vda={third.uri()}"]
    server.restart()
    assert size_of(server) == SIZE


def test_a_target_that_has_become_smaller_is_refused(
    start: Start, folder: Path, server: Kept
) -> None:
    """The disk's end is missing. The refusal says what to do if that is meant."""
    add(server.qmp)
    larger = pivot_to_larger(start, folder, server)
    server.stop()
    larger.stop()
    for size, is_served in ((SIZE - MiB, False), (SIZE, True), (SIZE - MiB, False)):
        os.truncate(larger.image, size)
        with larger:
            if is_served:
                server.restart()
                assert size_of(server) == SIZE
                server.stop()
            else:
                text = refusal(server)
                assert f"has {size} bytes, and the disk has {SIZE}: its end is missing" in text
    for name in ("vda.pivoted", "vda.json"):
        assert name in text
        (server.state / name).unlink()
    with larger:
        server.restart()
        assert size_of(server) == SIZE - MiB
        server.stop()


@pytest.mark.parametrize("has_bitmap", [True, False])
def test_a_record_of_an_older_version_has_no_size(
    start: Start, folder: Path, server: Kept, has_bitmap: bool
) -> None:
    """Then the disk's definition tells it, where there is one. Otherwise the disk may have been
    served larger since, so what it has now is what the device has."""
    if has_bitmap:
        add(server.qmp)
    pivot_to_larger(start, folder, server)
    server.stop()
    record = server.state / "vda.pivoted"
    said = json.loads(unseal("pivoted", record.read_bytes()))
    del said["size"]
    record.write_bytes(seal("pivoted", json.dumps(said).encode()))
    server.restart()
    assert size_of(server) == (SIZE if has_bitmap else SIZE + 4 * MiB)


def test_a_larger_device_that_is_no_target_of_a_pivot(server: Kept, disk: Path) -> None:
    """Who makes the file larger wants a larger disk."""
    server.stop()
    with disk.open("r+b") as file:
        file.truncate(SIZE + MiB)
    server.restart()
    assert size_of(server) == SIZE + MiB
