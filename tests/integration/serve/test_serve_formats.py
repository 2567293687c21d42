"""A disk is a raw image, or an export. An image of another format, served as the file that it is,
is told where users look: its first guest would overwrite the format's own data."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fixtures import Start
from support.images import MiB, make_image
from support.processes import run
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until


def problem(server: Nbdmirror) -> str:
    (disk,) = server.qmp.execute("x-nbdmirror-query-status")["disks"]
    return str(disk.get("problem", ""))


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("kind", ["qcow2", "vmdk", "vdi", "vhdx", "qed", "parallels"])
def test_an_image_of_another_format(start: Start, folder: Path, kind: str, cache: str) -> None:
    image = folder / f"disk.{kind}"
    run("qemu-img", "create", "-q", "-f", kind, str(image), "4M")
    with image.open("r+b") as file:
        file.truncate(-(-image.stat().st_size // 4096) * 4096)
    before = image.read_bytes()
    server = start(Nbdmirror(folder, f"vda={image}", options=("--cache", cache)))
    wait_until(lambda: problem(server), "the status says so")
    text = f"begins as a {kind} image does, and is served as it is"
    assert text in problem(server)
    server.wait_to_say(f"disk vda: {image}: {text}")
    assert image.read_bytes() == before


def test_a_raw_image_and_an_export(start: Start, folder: Path) -> None:
    image = folder / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "4M")
    export = start(QemuNbd(folder, image, "qcow2"))
    for disk in (export.uri(), make_image(folder / "disk.img", MiB), folder / "tiny.img"):
        if isinstance(disk, Path) and not disk.exists():
            disk.write_bytes(b"QFI\xfb")
        with Nbdmirror(folder, disk) as server:
            server.qmp.execute("query-jobs")
            assert not problem(server)
