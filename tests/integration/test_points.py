"""Points on real NBD servers: the event loop writes them through libnbd, the command recovers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.fixtures import Start
from support.pointsource import DISK_BYTES, WAIT_S_MAX, Source, nbdmirror
from support.processes import ROOT
from support.serverprocess import Server
from support.servers import NbdkitTarget, QemuNbd
from support.waiting import wait_until

from nbdmirror.errors import DeviceLost
from nbdmirror.points.applier import apply
from nbdmirror.points.format import RING_BYTES_MIN, RING_START, JournalError
from nbdmirror.points.requests import Side

FORMATS = {"raw": "raw", "qcow2": "qcow2", "without FUA and trim": "raw"}


@pytest.fixture
def servers(start: Start, folder: Path, request: pytest.FixtureRequest) -> list[Server]:
    form = FORMATS[request.param]
    found: list[Server] = []
    for name, size in (("image", DISK_BYTES), ("journal", RING_START + 16 * RING_BYTES_MIN)):
        place = folder / f"{name}-disk"
        place.mkdir()
        path = place / name
        subprocess.run(["qemu-img", "create", "-q", "-f", form, path, str(size)], check=True)
        found.append(start(QemuNbd(place, path, form)))
    return found


@pytest.mark.parametrize("servers", FORMATS, indirect=True)
def test_points_on_real_servers(servers: list[Server], request: pytest.FixtureRequest) -> None:
    image, journal = (server.uri() for server in servers)
    source = Source(image, journal)
    if "without FUA" in request.node.name:  # no server of ours can be told to have none
        device = source.devices[Side.JOURNAL]
        device.announced = replace(device.announced, can_fua=False, can_trim=False)
    source.open()
    source.seed()
    source.point((0, 64 << 10))
    source.point((1 << 20, 3 << 20), (4096, 4096))
    source.point((2 << 20, 1 << 20), (0, 16384), zero=True)
    source.point()
    source.run(apply(source.writer, 1))
    source.point((7 << 20, 1 << 20), (2 << 20, 4096))
    listed = nbdmirror("points", journal)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "; 5 points\n" in listed.stdout
    recovered = nbdmirror("recover", "--image", image, "--journal", journal, "--point", "4")
    assert recovered.returncode == 0, recovered.stderr
    found = memoryview(bytearray(DISK_BYTES))
    source.devices[Side.IMAGE].pread(found, 0)
    assert found == source.contents[4]
    with pytest.raises(JournalError, match="point 4 was recovered from this journal at"):
        source.point((0, 4096))
    source.close()


@pytest.mark.parametrize("servers", ["raw"], indirect=True)
def test_a_lost_connection_ends_the_writer(servers: list[Server]) -> None:
    """What was not flushed may be lost with the server, and no later flush covers it."""
    image, journal = (server.uri() for server in servers)
    source = Source(image, journal)
    source.open()
    source.seed()
    source.point((0, 64 << 10))
    device = source.devices[Side.JOURNAL]
    point = source.on_loop(lambda: source.writer.begin(1, bytes_max=4096))
    assert point.sequence == 2
    source.wait(lambda done: source.writer.put([(0, 4096, memoryview(bytes(4096)))], done))
    device.pool.generation += 1  # as after a reconnect
    with pytest.raises(DeviceLost, match="the connection was lost meanwhile"):
        source.wait(source.writer.commit)
    listed = nbdmirror("points", journal)
    assert "; 1 point\n" in listed.stdout
    source.close()


@pytest.mark.parametrize("servers", ["raw"], indirect=True)
def test_what_the_command_refuses(servers: list[Server], start: Start, folder: Path) -> None:
    image, journal = (server.uri() for server in servers)
    source = Source(image, journal)
    source.open()
    source.seed()
    source.point((0, 64 << 10))
    source.close()
    before = [(folder / f"{name}-disk" / name).read_bytes() for name in ("image", "journal")]
    link = folder / "link"
    link.symlink_to(servers[0].socket)
    files = [str(folder / f"{name}-disk" / name) for name in ("image", "journal")]
    read_only = folder / "read-only"
    read_only.mkdir()
    copy = read_only / "copy"
    copy.write_bytes(before[0])
    frozen = start(QemuNbd(read_only, copy, read_only=True)).uri()
    cases = {
        (image, f"nbd+unix:///?socket={link}"): "--journal: names the same disk as --image",
        (files[0], journal): f"--image: {files[0]}: is in use by another process",
        (image, files[1]): f"--journal: {files[1]}: is in use by another process",
        (image, image.replace("?", "other?")): "--journal: ",
        (frozen, journal): f"--image: {frozen}: the export is read-only",
        (journal, image): f"{image}: is not a journal: it holds something else",
    }
    for (one, other), message in cases.items():
        refused = nbdmirror("recover", "--image", one, "--journal", other)
        assert refused.returncode == 1, message
        assert refused.stderr.startswith(f"nbdmirror: {message}")
        assert refused.stderr.count("\n") == 1
    after = [(folder / f"{name}-disk" / name).read_bytes() for name in ("image", "journal")]
    assert before == after


@pytest.mark.parametrize("killed", ["the image's server", "the command"])
def test_a_recovery_that_is_cut_off_is_done_again(start: Start, folder: Path, killed: str) -> None:
    parts = []
    for name, size in (("image", DISK_BYTES), ("journal", RING_START + 16 * RING_BYTES_MIN)):
        (folder / name).mkdir()
        parts.append(folder / name / "disk")
        parts[-1].write_bytes(bytes(size))
    journal = start(QemuNbd(folder / "journal", parts[1])).uri()
    image = start(QemuNbd(folder / "image", parts[0]))
    source = Source(image.uri(), journal)
    source.open()
    source.seed()
    source.point((0, DISK_BYTES))
    source.close()
    image.stop()
    before = parts[0].read_bytes()
    delayed = (f"file={parts[0]}", "delay-write=500ms")
    slow = NbdkitTarget(folder / "image", "file", *delayed, filters=("delay",))
    uri = start(slow).uri()
    argv = ["recover", "--image", uri, "--journal", journal]
    command = subprocess.Popen(
        [sys.executable, "-m", "nbdmirror", *argv], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    wait_until(lambda: parts[0].read_bytes() != before, "the image changes", WAIT_S_MAX)
    if killed == "the command":
        command.kill()
        command.communicate(timeout=WAIT_S_MAX)
        slow.kill()
    else:
        slow.kill()
        _, said = command.communicate(timeout=WAIT_S_MAX)
        assert command.returncode == 1
        assert said.endswith(f"nbdmirror: {uri}: connection lost; run the command again\n")
    assert parts[0].read_bytes() not in (before, source.contents[1])
    quick = start(QemuNbd(folder / "image", parts[0])).uri()
    again = nbdmirror("recover", "--image", quick, "--journal", journal)
    assert again.returncode == 0, again.stderr
    assert parts[0].read_bytes() == source.contents[1]
