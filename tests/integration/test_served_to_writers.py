"""`nbdmirror serve --journal` to guests that write: a point is served at once, and becomes the
image."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fixtures import Start
from support.pointsource import DISK_BYTES, Far, nbdmirror, read
from support.seeds import SEED, print_seed
from support.servers import NbdkitTarget, Nbdmirror
from support.waiting import wait_until

from nbdmirror.errors import DeviceError
from nbdmirror.nbdclient.device import NbdDevice

SECTOR = 512


@pytest.fixture
def far(start: Start, folder: Path) -> Iterator[Far]:
    found = Far(start, folder)
    yield found
    found.source.close()


def serve(start: Start, far: Far, image: str, *more: str) -> Nbdmirror:
    options = ("--journal", far.journal, *more)
    return start(Nbdmirror(far.folder, f"vda={image}", options=options))


def has_all(server: Nbdmirror) -> bool:
    return "the journal is not needed any more" in server.stderr


def listed(far: Far) -> str:
    return nbdmirror("points", far.journal).stdout


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_guest_writes_at_once_and_the_image_becomes_the_point(
    far: Far, start: Start, number: int
) -> None:
    expected = bytearray(far.source.contents[number])
    server = serve(start, far, far.image, "--point", str(number))
    device = NbdDevice.open(server.uri("vda"))
    assert not device.read_only and device.size == DISK_BYTES
    for at in (1, (1 << 20) - 100, (7 << 20) + 4097, DISK_BYTES - 300):
        data = random.Random(at).randbytes(300)
        device.pwrite(data, at, True)
        expected[at : at + 300] = data
    device.zero(2 << 20, 70_000)
    expected[2 << 20 : (2 << 20) + 70_000] = bytes(70_000)
    assert read(device) == expected
    wait_until(lambda: has_all(server), "the image has the point")
    device.pwrite(b"later", 5)
    expected[5:10] = b"later"
    assert read(device) == expected
    device.close()
    status = server.qmp.disk()
    assert "point" not in status["source"]
    server.stop()
    assert far.files[0].read_bytes() == expected
    assert "recovered at " in listed(far)
    assert "the image is in use there" in far.refused(far.image, *far.options())


def test_the_journal_may_go_when_the_image_has_all(far: Far, start: Start) -> None:
    server = serve(start, far, far.image)
    wait_until(lambda: has_all(server), "the image has the point")
    far.source.close()
    far.servers[1].stop()
    device = NbdDevice.open(server.uri("vda"))
    device.pwrite(b"guest", 0)
    device.flush()
    assert read(device) == b"guest" + far.source.contents[5][5:]
    device.close()
    server.stop()


def test_a_server_that_starts_again_serves_the_image(far: Far, start: Start) -> None:
    server = serve(start, far, far.image)
    wait_until(lambda: has_all(server), "the image has the point")
    device = NbdDevice.open(server.uri("vda"))
    device.pwrite(b"guest", 0)
    device.close()
    server.stop()
    again = serve(start, far, far.image)
    device = NbdDevice.open(again.uri("vda"))
    assert read(device) == b"guest" + far.source.contents[5][5:]
    device.close()
    line = far.refused(far.image, "--journal", far.journal, "--point", "4")
    assert "point 5 was recovered at " in line and "there is no other point any more" in line


def slow_image(start: Start, far: Far) -> NbdkitTarget:
    """The image, behind a server that needs a tenth of a second for each write."""
    parameters = (str(far.files[0]), "wdelay=100ms")
    return start(
        NbdkitTarget(far.folder, "file", *parameters, filters=("delay",), options=("--threads=1",))
    )


class Writer:
    """A guest that writes at random places until its server ends. `expected`: what was answered."""

    def __init__(self, uri: str, expected: bytearray, seed: int) -> None:
        self.expected = expected
        self.last: tuple[int, bytes] | None = None
        """The request that may have been done in part."""
        self.count = 0
        self._random = random.Random(seed)
        self._device = NbdDevice.open(uri)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(DeviceError, OSError):
            while True:
                length = self._random.randrange(1, 20) * SECTOR
                at = self._random.randrange((DISK_BYTES - length) // SECTOR) * SECTOR
                data = self._random.randbytes(length)
                self.last = (at, data)
                self._device.pwrite(data, at)
                self.expected[at : at + length] = data
                self.last = None
                self.count += 1

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._device.close()


def settle(expected: bytearray, seen: bytes, last: tuple[int, bytes] | None) -> None:
    """What was not answered may be there, by sectors; all else is what it was."""
    if last is not None:
        at, data = last
        for sector in range(0, len(data), SECTOR):
            part = slice(at + sector, at + sector + SECTOR)
            if seen[part] == data[sector : sector + SECTOR]:
                expected[part] = seen[part]
    assert seen == expected


@pytest.mark.guarantee("A point is served at once")
def test_a_server_that_is_killed_loses_nothing_that_was_answered(far: Far, start: Start) -> None:
    print_seed()
    expected = bytearray(far.source.contents[4])
    chosen = random.Random(SEED)
    for number in range(5):
        image = slow_image(start, far)
        server = serve(start, far, image.uri(), "--point", "4")
        writer = Writer(server.uri("vda"), expected, SEED + number)
        until = chosen.randrange(1, 8)
        wait_until(lambda: writer.count >= until, "the guest writes")  # noqa: B023 - in this round
        assert "is served since" in listed(far) or has_all(server)
        server.kill()
        writer.join()
        image.stop()
        again = serve(start, far, far.image)
        device = NbdDevice.open(again.uri("vda"))
        settle(expected, read(device), writer.last)
        device.close()
        again.kill()
    line = nbdmirror("recover", "--image", far.image, "--journal", far.journal)
    assert line.returncode == 0, line.stderr
    assert far.files[0].read_bytes() == expected


def test_what_waits_until_the_image_has_all(far: Far, start: Start) -> None:
    """No mirror from a disk whose image is not the disk yet."""
    image = slow_image(start, far)
    server = serve(start, far, image.uri())
    target = start(NbdkitTarget(far.folder, "memory", str(DISK_BYTES)))
    arguments = {"device": "vda", "target": target.uri(), "sync": "full", "mode": "existing"}
    refusal = server.qmp.refusal("drive-mirror", **arguments)
    assert "becomes point 5 of " in refusal and "try again when it has all of it" in refusal
    line = nbdmirror("status", "--qmp", str(server.qmp_path)).stdout
    assert "becomes point 5 of " in line
    wait_until(lambda: has_all(server), "the image has the point")
    server.qmp.execute("drive-mirror", **arguments)
    server.stop()
    assert far.files[0].read_bytes() == far.source.contents[5]


def test_a_journal_that_cannot_be_written_is_refused(far: Far, start: Start) -> None:
    far.source.close()
    far.servers[1].stop()
    read_only = start(NbdkitTarget(far.folder, "file", str(far.files[1]), options=("-r",)))
    line = far.refused(far.image, "--journal", read_only.uri())
    assert "the export is read-only" in line
