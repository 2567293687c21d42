"""A state directory that another version of nbdmirror has written to, which this one cannot read:
the start is refused, and nothing is changed, so that the other version takes it up."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from integration.state.stateparts import SIZE, End, begin, ends, finish, settle
from integration.state.test_state_bitmaps import add
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import MiB, make_image
from support.kept import Kept, refusal
from support.servers import QemuNbd

from nbdmirror.state.sealed_files import seal

OTHER = "start the nbdmirror that wrote it, or a newer one"
SECTOR = 512


def newer(path: Path) -> None:
    """Of version 2, whatever that may be."""
    content = path.read_bytes()
    if path.suffix != ".intents":
        path.write_bytes(re.sub(rb"\A(nbdmirror \w+) 1 ", rb"\1 2 ", content))
        return
    with path.open("r+b") as file:
        for start in range(0, len(content), SECTOR):
            body = content[start : start + SECTOR - 4].replace(b"NBMI\1\0", b"NBMI\2\0")
            file.write(body + struct.pack("<I", zlib.crc32(body)))


def change(path: Path, key: str, value: object) -> None:
    """A sound file, with something in it that this version does not know."""
    line, _, body = path.read_bytes().partition(b"\n")
    said = json.loads(body)
    path.write_bytes(seal(line.split()[1].decode(), json.dumps(said | {key: value}).encode()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(server: Kept) -> str:
    """What it says; the files are as they were."""
    before = contents(server.state)
    said = refusal(server)
    assert contents(server.state) == before
    return said


@ends
@pytest.mark.parametrize("file", ["vda.json", "vda.bitmaps", "vda.intents"])
def test_a_newer_file_is_left_to_who_can_read_it(
    identical: Identical, server: Kept, target: QemuNbd, disk: Path, end: End, file: str
) -> None:
    add(server.qmp)
    begin(server, target).wait_ready()
    settle(server)
    end(server)
    kept = contents(server.state)
    newer(server.state / file)
    said = refused(server)
    assert f"{server.state}/{file}: has version 2 of the format" in said
    assert "reads version 1" in said and OTHER in said

    (server.state / file).write_bytes(kept[file])  # and so says the one that can read it
    server.restart()
    assert finish(server) <= 2 * MiB
    identical(disk, target.image)


Change = Callable[[Path], None]


@pytest.mark.parametrize(
    ("file", "change_it", "says"),
    [
        ("vda.json", lambda path: change(path, "bitmaps", 3),
         "bitmaps: expected a list of objects, found 3"),
        ("vda.json", lambda path: change(path, "memory", None),
         "memory: expected a string, found null"),
        ("vda.json", lambda path: path.write_bytes(seal("disk", b"{}")),
         "disk_id: expected 32 hexadecimal digits, but it is missing"),
        ("vda.bitmaps", lambda path: path.write_bytes(seal("bitmaps", b'{"disk": 3}')),
         "disk: expected 32 hexadecimal digits, found 3"),
    ],
    ids=["a list", "a string", "nothing", "bitmaps"],
)  # fmt: skip
def test_a_sound_file_that_is_not_understood(
    server: Kept, target: QemuNbd, file: str, change_it: Change, says: str
) -> None:
    """Its checksum is right, so it is not damage that has made it so."""
    begin(server, target).wait_ready()
    server.stop()
    change_it(server.state / file)
    said = refused(server)
    assert f"{server.state}/{file}: {says}" in said and OTHER in said


def test_a_sound_record_of_a_pivot_that_is_not_understood(server: Kept, target: QemuNbd) -> None:
    begin(server, target).wait_ready()
    server.qmp.complete()
    server.stop()
    change(server.state / "vda.pivoted", "left", ["/srv/disk.img"])
    said = refused(server)
    assert 'vda.pivoted: left[0]: expected an object, found "/srv/disk.img"' in said
    assert OTHER in said and "--accept-old-side" in said


def test_a_newer_record_of_a_pivot(server: Kept, target: QemuNbd, folder: Path, disk: Path) -> None:
    """Which side is the disk only the newer one knows: neither is served, and the old side not
    under another name either, until somebody says which it is."""
    begin(server, target).wait_ready()
    server.qmp.complete()
    server.stop()
    newer(server.state / "vda.pivoted")
    for side in (str(disk), target.uri()):
        server.disks = [f"vda={side}"]
        said = refused(server)
        assert "vda.pivoted: has version 2 of the format" in said and OTHER in said
    other = make_image(folder / "other.img", SIZE, seed=4)
    for source in (disk, other):
        server.disks = [f"vdb={source}"]
        said = refused(server)
        assert f"{source} may be the old side of the disk vda" in said and OTHER in said
    accepted = re.search(r"--accept-old-side ([0-9a-f]{8})\b", said)
    assert accepted is not None
    server.options = (*server.options, "--accept-old-side", accepted[1])
    server.restart()
    assert (server.state / "vda.pivoted").exists()


def test_a_newer_file_of_another_disk(start: Start, folder: Path, disk: Path) -> None:
    """The first disk's files stay as an orderly end has left them."""
    server = Kept(folder, disk)
    server.disks.append(f"vdb={make_image(folder / 'other.img', SIZE, seed=4)}")
    start(server)
    for node in ("vda", "vdb"):
        server.qmp.execute("block-dirty-bitmap-add", node=node, name="b", persistent=True)
    server.stop()
    newer(server.state / "vdb.json")
    assert "vdb.json: has version 2 of the format" in refused(server)


def test_accepting_an_old_side_loses_nothing_that_is_newer(server: Kept, target: QemuNbd) -> None:
    """What is refused has not been half done."""
    add(server.qmp)
    begin(server, target).wait_ready()
    server.qmp.complete()
    server.stop()
    accepted = re.search(r"--accept-old-side ([0-9a-f]{8})\b", refused(server))
    assert accepted is not None
    newer(server.state / "vda.json")
    server.options = (*server.options, "--accept-old-side", accepted[1])
    assert "vda.json: has version 2 of the format" in refused(server)


def test_a_newer_line_on_the_last_job_is_forgotten(server: Kept, target: QemuNbd) -> None:
    """Nothing depends on it."""
    begin(server, target).wait_ready()
    server.qmp.complete()
    server.stop()
    newer(server.state / "vda.last")
    server.disks = [f"vda={target.uri()}"]
    server.allowed.append("the result of its last job is not known")
    server.restart()
    with connected(server.uri()) as guest:
        assert guest.get_size() == SIZE
    assert "vda: the result of its last job is not known: has version 2" in server.stderr
