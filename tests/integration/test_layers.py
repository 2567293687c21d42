"""Things that share storage, whatever they are called: loop devices, partitions, device-mapper."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.images import KiB, MiB, make_image
from support.kept import refusal
from support.mounts import loop_device
from support.servers import NbdkitTarget, Nbdmirror

from nbdmirror import layers
from nbdmirror import syscalls as linux
from nbdmirror.identity import Same, same_place
from nbdmirror.layers import WHOLE, Layer, layers_of, share_storage

SIZE = 4 * MiB


def shared(one: Path | str, other: Path | str) -> bool | None:
    first, second = (layers_of(os.stat(path), str(path)) for path in (one, other))
    answer = share_storage(first, second)
    assert answer is share_storage(second, first)
    return answer


def test_ranges() -> None:
    def layer(*ends: int) -> Layer:
        return Layer(("device", 1, 0), (ends[0], ends[1]) if ends else None)

    whole = Layer(("device", 1, 0), WHOLE)
    assert layer(0, 10).overlaps(layer(9, 20)) is True
    assert layer(0, 10).overlaps(layer(10, 20)) is False
    assert whole.overlaps(layer(10, 20)) is True
    assert whole.overlaps(layer()) is True, "wherever it is"
    assert layer().overlaps(layer(0, 10)) is None
    assert layer().overlaps(layer()) is None
    assert whole.overlaps(Layer(("device", 2, 0), WHOLE)) is False


def test_loop_devices(tmp_path: Path) -> None:
    disk, other = (make_image(tmp_path / name, SIZE) for name in ("disk", "other"))
    hard = tmp_path / "hard"
    hard.hardlink_to(disk)
    with ExitStack() as stack:
        loop, second, foreign, upper = (
            stack.enter_context(loop_device(path)) for path in (disk, hard, other, other)
        )
        above = stack.enter_context(loop_device(Path(loop)))
        for one in (loop, second, above, hard):
            assert shared(disk, one) is True
            assert shared(foreign, one) is False
        assert shared(foreign, upper) is True
        node = tmp_path / "node"
        os.mknod(node, stat.S_IFBLK | 0o600, os.stat(above).st_rdev)
        assert shared(disk, node) is True
        known, file = linux.known_status(str(node)), os.stat(disk)
        assert known is not None and known.number == os.stat(above).st_rdev
        assert layers.size_of_device(known.number) == SIZE
        known = linux.known_status(str(disk))
        assert known is not None and (known.number, known.size) == (0, SIZE)
        assert (known.mode, known.device, known.inode) == (file.st_mode, file.st_dev, file.st_ino)
        assert linux.known_status(str(tmp_path / "none")) is None


def test_parts_of_a_file(tmp_path: Path) -> None:
    """Loop devices with an offset or a limit: only what overlaps is the same storage."""
    disk = make_image(tmp_path / "disk", SIZE)
    with ExitStack() as stack:
        first, second, rest = (
            stack.enter_context(loop_device(disk, offset=offset, sizelimit=limit))
            for offset, limit in ((0, MiB), (MiB, MiB), (512 * KiB, 0))
        )
        assert shared(first, second) is False
        assert shared(first, rest) is shared(second, rest) is True
        assert shared(disk, first) is shared(disk, second) is True


def test_a_file_that_is_not_where_it_was(tmp_path: Path) -> None:
    """The name that the kernel shows is another file's then."""
    disk = make_image(tmp_path / "disk", SIZE)
    with loop_device(disk) as loop:
        moved = disk.rename(tmp_path / "moved")
        other = make_image(disk, SIZE)
        assert shared(loop, moved) is True
        assert shared(loop, other) is False


def test_what_the_kernel_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions of a disk, logical volumes on a partition, and two paths to one disk."""
    monkeypatch.setattr(layers, "DEVICES", tmp_path)
    sectors = 1 << 20

    def device(minor: int, *on: int, size: int = sectors, start: int | None = None) -> list[Layer]:
        folder = tmp_path / f"8:{minor}"
        if start is not None:
            folder = tmp_path / f"8:{on[0]}" / f"part{minor}"
            (tmp_path / f"8:{minor}").symlink_to(folder)
        (folder / "slaves").mkdir(parents=True)
        (folder / "dev").write_text(f"8:{minor}\n")
        (folder / "size").write_text(f"{size}\n")
        if start is not None:
            (folder / "partition").write_text("1\n")
            (folder / "start").write_text(f"{start}\n")
        for below in on if start is None else ():
            (folder / "slaves" / f"sd{below}").symlink_to(tmp_path / f"8:{below}")
        return layers.layers_of_device(os.makedev(8, minor))

    disk, other = device(0), device(16)
    first = device(1, 0, start=2048, size=2048)
    second = device(2, 0, start=4096, size=sectors - 4096)
    on_second, beside = device(32, 2, size=2048), device(33, 2, size=2048)
    on_first, mirror = device(34, 1, size=2048), device(35, 0, 16)
    for one in (first, second, on_second, beside, on_first, mirror):
        assert share_storage(disk, one) is True
    assert share_storage(first, second) is share_storage(disk, other) is False
    assert share_storage(on_second, second) is share_storage(other, mirror) is True
    assert share_storage(on_first, first) is True, "it is as large"
    assert share_storage(on_first, second) is False
    assert share_storage(on_second, beside) is None


@pytest.mark.parametrize("served", ["file", "loop"])
@pytest.mark.parametrize("written", ["file", "loop", "loop on a loop", "node elsewhere"])
def test_a_target_on_the_disks_own_storage(folder: Path, served: str, written: str) -> None:
    """Its server is a process of this host that writes to it under another name."""
    disk = make_image(folder / "disk.img", SIZE)
    with ExitStack() as stack:
        loop = stack.enter_context(loop_device(disk))
        source = {"file": disk, "loop": Path(loop)}[served]
        target = Path(loop) if written == "loop" else disk
        if written == "loop on a loop":
            target = Path(stack.enter_context(loop_device(Path(loop))))
        elif written == "node elsewhere":
            target = folder / "node"
            os.mknod(target, stat.S_IFBLK | 0o600, os.stat(loop).st_rdev)
        server = stack.enter_context(Nbdmirror(folder, source))
        same = stack.enter_context(NbdkitTarget(folder, "file", str(target)))
        text = server.qmp.refusal(
            "drive-mirror", device="disk0", target=same.uri(), sync="full", mode="existing"
        )
    assert f"writes to '{source}' itself" in text


def test_a_target_that_is_another_part_is_taken(folder: Path) -> None:
    disk = make_image(folder / "disk.img", SIZE)
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(loop_device(disk, offset=offset, sizelimit=MiB))
            for offset in (0, MiB)
        )
        target = stack.enter_context(NbdkitTarget(folder, "file", second))
        server = stack.enter_context(Nbdmirror(folder, first))
        server.qmp.execute(
            "drive-mirror", device="disk0", target=target.uri(), sync="full", mode="existing"
        )
        server.qmp.wait_ready("disk0")
        server.qmp.complete("disk0")
        assert Path(first).read_bytes() == Path(second).read_bytes()


@pytest.mark.parametrize("old", ["file", "loop"])
@pytest.mark.parametrize("new", ["loop", "file", "loop on a loop"])
def test_the_old_side_under_another_disks_name(folder: Path, old: str, new: str) -> None:
    disk = make_image(folder / "disk.img", SIZE)
    state = ("--state-dir", str(folder / "state"))
    with ExitStack() as stack:
        loop = stack.enter_context(loop_device(disk))
        source = {"file": disk, "loop": Path(loop)}[old]
        with (
            NbdkitTarget(folder, "memory", str(SIZE)) as target,
            Nbdmirror(folder, f"vda={source}", options=state) as server,
        ):
            server.qmp.execute(
                "drive-mirror", device="vda", target=target.uri(), sync="full", mode="existing"
            )
            server.qmp.wait_ready("vda")
            server.qmp.complete("vda")
        again = {"loop": Path(loop), "file": disk}.get(new)
        if new == "loop on a loop":
            again = Path(stack.enter_context(loop_device(Path(loop))))
        said = refusal(Nbdmirror(folder, f"vdb={again}", options=state))
        assert "is the old side of the disk vda" in said
        other = make_image(folder / "other.img", SIZE)
        with Nbdmirror(folder, f"vdb={stack.enter_context(loop_device(other))}", options=state):
            pass  # another storage is taken


def test_two_disks_on_one_storage(folder: Path) -> None:
    disk = make_image(folder / "disk.img", SIZE)
    with loop_device(disk) as loop:
        assert same_place(str(disk), loop) is Same.NO, "names are one thing, storage another"
        assert "shares storage with disk 'a'" in refusal(
            Nbdmirror(folder, f"a={disk}", f"b={loop}")
        )
