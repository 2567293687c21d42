"""`nbdmirror serve --journal --read-only`: a point is served beside a source that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fixtures import Start
from support.pointsource import DISK_BYTES, Far, nbdmirror, read
from support.servers import Nbdmirror, QemuNbd

from nbdmirror.errors import DeviceError
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.points.applier import apply
from nbdmirror.points.format import RING_START


@pytest.fixture
def far(start: Start, folder: Path) -> Iterator[Far]:
    found = Far(start, folder)
    yield found
    found.source.close()


def test_a_point_is_served_at_once_and_nothing_is_written(
    far: Far, start: Start, folder: Path
) -> None:
    before = far.bytes()
    for number in (1, 3, 4, 5):
        point = () if number == 5 else ("--point", str(number))
        server = start(Nbdmirror(folder, f"vda={far.image}", options=far.options(*point)))
        device = NbdDevice.open(server.uri("vda"))
        assert device.read_only and device.size == DISK_BYTES
        is_right = read(device) == far.source.contents[number]
        assert is_right, f"point {number} is wrong"
        at = 0
        while at < DISK_BYTES:
            for extent in device.extents(at, DISK_BYTES - at):
                content = far.source.contents[number][at : at + extent.length]
                assert not extent.zero or not any(content)
                at += extent.length
        status = server.qmp.execute("x-nbdmirror-query-status")
        assert f"at point {number} of 2" in str(status)
        device.close()
        server.stop()
    is_same = far.bytes() == before
    assert is_same, "the image or the journal has changed"


def test_a_point_is_served_until_a_later_one_is_applied(
    far: Far, start: Start, folder: Path
) -> None:
    """Points are sent and applied meanwhile, and the journal's space is used again."""
    options = far.options("--point", "4")
    server = start(Nbdmirror(folder, f"vda={far.image}", options=options))
    server.allowed.append("point [45]")
    device = NbdDevice.open(server.uri("vda"))
    source, expected = far.source, far.source.contents[4]
    source.run(apply(source.writer, 3))
    assert read(device) == expected
    source.run(apply(source.writer, 4))
    source.point((0, 7 << 20))  # where the points before were: the ring has 16 MiB
    is_right = read(device) == expected
    assert is_right, "the point has changed"
    assert "all reads fail" not in nbdmirror("status", "--qmp", str(server.qmp_path)).stdout
    source.run(apply(source.writer, 5))
    with pytest.raises(DeviceError):
        read(device)
    device.close()
    shown = nbdmirror("status", "--qmp", str(server.qmp_path)).stdout
    assert f"all reads fail: {far.journal}: point 4 cannot be served any more" in shown
    server.wait_to_say("point 4 cannot be served any more: the image is being made point 5")
    again = start(Nbdmirror(folder, f"vda={far.image}", options=far.options()))
    device = NbdDevice.open(again.uri("vda"))
    assert read(device) == source.contents[6]
    device.close()


def test_a_recovery_ends_what_is_served(far: Far, start: Start, folder: Path) -> None:
    server = start(Nbdmirror(folder, f"vda={far.image}", options=far.options()))
    server.allowed.append("point [45]")
    device = NbdDevice.open(server.uri("vda"))
    assert read(device) == far.source.contents[5]
    done = nbdmirror("recover", "--image", far.image, "--journal", far.journal, "--point", "4")
    assert done.returncode == 0, done.stderr
    with pytest.raises(DeviceError):
        read(device)
    device.close()
    server.wait_to_say("point 4 was recovered at ")
    line = far.refused(far.image, *far.options())
    assert "point 4 was recovered from this journal at " in line
    assert "serve the image without its journal" in line


def test_what_is_refused(far: Far, start: Start, folder: Path) -> None:
    image, journal = far.image, far.journal
    other = folder / "other"
    other.mkdir()
    (other / "disk").write_bytes(bytes(DISK_BYTES))
    (other / "small").write_bytes(bytes(4096))
    foreign = start(QemuNbd(other, other / "disk")).uri()
    words = ("--journal", "hello", "--read-only")
    cases = {
        (image, *far.options("--point", "9")): "has no point '9': it has 1 to 5",
        (image, *far.options("--point", "weekly")): "has no point 'weekly': it has 1 to 5",
        (
            image,
            "--journal",
            journal,
            "--mirror-to",
            foreign,
        ): "mirror-to: not allowed with",
        (
            image,
            "--journal",
            journal,
            "--state-dir",
            "s",
        ): "not allowed with --state-dir",
        (image, *words): "hello: does not exist; a journal is an NBD URI, a raw file or a block",
        (image, "--journal", foreign, "--read-only"): "is not a journal: it is empty",
        (foreign, *far.options()): "the image does not hold point 1, on which this builds",
        (str(other / "small"), *far.options()): "is the journal of another disk than the image: ",
        (image, "--journal", image, "--read-only"): "names the same disk as the image",
        (image, foreign, *far.options()): "--journal: belongs to one disk, and more are served",
        (image, "--point", "4"): "--point: needs --journal",
        (image, *far.options("--state-dir", "s")): "not allowed with --state-dir",
        (str(folder / "nothing"), *far.options()): "nothing: no such disk",
    }
    for argv, message in cases.items():
        assert message in far.refused(*argv)


def test_a_damaged_point_is_no_data(far: Far, start: Start, folder: Path) -> None:
    header = far.source.writer.headers[-1]
    place = RING_START + header.place + 4096 + 100
    with far.files[1].open("r+b") as file:
        file.seek(place)
        file.write(b"damage")
    server = start(Nbdmirror(folder, f"vda={far.image}", options=far.options()))
    server.allowed.append("point [45]")
    device = NbdDevice.open(server.uri("vda"))
    with pytest.raises(DeviceError):
        read(device, 7 << 20, 4096)
    assert read(device, 1 << 20, 4096) == far.source.contents[5][1 << 20 :][:4096]
    device.close()
    server.wait_to_say(f"the data at {7 << 20} of the disk, of point 5, is damaged")
