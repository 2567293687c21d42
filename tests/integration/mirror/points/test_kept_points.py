"""Points that are kept: each of the window is what the disk was at its cut, and a journal that has
no room for all of them keeps the newest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from integration.mirror.points.pointsparts import (
    RING_BYTES,
    SIZE,
    FarSide,
    last_point,
    left_bytes,
    points_of,
    wait_for_rest,
)
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import KiB, MiB
from support.processes import nbdmirror
from support.servers import Nbdmirror
from support.waiting import wait_until

from nbdmirror.points.format import RING_BYTES_MIN


@pytest.fixture
def server(start: Start, disk: Path) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, disk, bare=True))


def asked_point(server: Nbdmirror, name: str) -> None:
    server.qmp.execute("x-nbdmirror-point", id="j", name=name, wait=True)


def listed(far: FarSide) -> str:
    done = nbdmirror("points", str(far.journal))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_each_point_of_the_window_can_be_recovered(
    start: Start, server: Nbdmirror, folder: Path, disk: Path, identical: Identical
) -> None:
    """And served, while the source goes on."""
    far = FarSide(start, folder, ring=4 * RING_BYTES)
    far.start_mirror(server, x_nbdmirror_keep=3600)
    server.qmp.wait_ready()
    contents: dict[str, bytes] = {}
    for number in range(4):
        with Guest(server.uri(), disk, seed=number) as guest:
            guest.wait_for_requests(20)
        contents[f"point-{number}"] = disk.read_bytes()
        asked_point(server, f"point-{number}")
    found = points_of(server)
    assert found["keep-s"] == 3600 and found["kept"] is True
    assert found["points"] == last_point(server) >= 5
    image, journal = far.image_server.uri(), far.journal_server.uri()
    options = ("--journal", journal, "--read-only", "--point", "point-1")
    view = start(Nbdmirror(folder, f"vda={image}", options=options))
    with Guest(server.uri(), disk, seed=9) as guest, connected(view.uri("vda")) as client:
        guest.wait_for_requests(40)
        is_right = client.pread(SIZE, 0) == contents["point-1"]
        assert is_right, "what is served of the point has changed"
    view.stop()
    wait_until(lambda: left_bytes(server) == 0, "a point has everything")
    contents[str(last_point(server))] = disk.read_bytes()
    server.kill()
    far.stop()
    before = far.image.read_bytes(), far.journal.read_bytes()
    for point, expected in contents.items():
        far.image.write_bytes(before[0])
        far.journal.write_bytes(before[1])
        identical(expected, far.recover("--point", point))


def test_what_is_older_is_applied_and_its_space_used_again(
    start: Start, server: Nbdmirror, folder: Path, disk: Path, identical: Identical
) -> None:
    """Ten times as much as the journal holds goes through it."""
    far = FarSide(start, folder, ring=RING_BYTES_MIN)
    far.start_mirror(server, x_nbdmirror_keep=0.3)
    server.qmp.wait_ready()
    with connected(server.uri()) as guest:
        for number in range(40):
            guest.pwrite(bytes([number]) * 256 * KiB, number % 8 * MiB)
            asked_point(server, f"n{number}")
    wait_until(lambda: points_of(server)["points"] == 1, "the window has gone by")
    wait_for_rest(server)
    server.kill()
    far.stop()
    assert "; 1 point\n" in listed(far)
    identical(disk, far.image)
    identical(disk, far.recover())


def test_a_journal_without_room_keeps_the_newest(
    start: Start, server: Nbdmirror, folder: Path, disk: Path, identical: Identical
) -> None:
    far = FarSide(start, folder, ring=RING_BYTES_MIN)
    far.start_mirror(server, x_nbdmirror_keep=3600)
    server.qmp.wait_ready()
    contents: list[bytes] = []
    with connected(server.uri()) as guest:
        for number in range(8):
            guest.pwrite(bytes([number]) * 256 * KiB, number % 3 * MiB)
            contents.append(disk.read_bytes())
            asked_point(server, f"n{number}")
    told = server.qmp.wait_for_event("X_NBDMIRROR_KEEP")
    assert told["kept"] is False and told["keep-s"] == 3600 and told["reaches-s"] < 3600
    found = points_of(server)
    assert found["kept"] is False and found["reaches-s"] < 3600
    shown = nbdmirror("status", "--qmp", server.qmp_path).stdout
    assert "and --keep asks for 1:00:00: the journal is too small for that" in shown
    assert server.qmp.job()["status"] == "ready"
    server.kill()
    far.stop()
    names = [name for name in (f"n{number}" for number in range(8)) if name in listed(far)]
    assert 2 <= len(names) < 8 and names[-1] == "n7", names
    before = far.image.read_bytes(), far.journal.read_bytes()
    for name in names:
        far.image.write_bytes(before[0])
        far.journal.write_bytes(before[1])
        identical(contents[int(name[1:])], far.recover("--point", name))


def test_a_pivot_ends_the_history(
    start: Start, server: Nbdmirror, folder: Path, disk: Path, identical: Identical
) -> None:
    far = FarSide(start, folder, ring=RING_BYTES)
    with Guest(server.uri(), disk) as guest:
        identical(guest, far.image_server.uri())
        far.start_mirror(server, x_nbdmirror_keep=3600)
        server.qmp.wait_ready()
        guest.wait_for_requests(40)
        asked_point(server, "before")
        server.qmp.complete()
        guest.wait_for_requests(20)
    done = nbdmirror("points", far.journal_server.uri(), "--json")
    assert '"state": "promoted"' in done.stdout
    assert not [e for e in server.qmp.events if e["event"] == "X_NBDMIRROR_KEEP"]


def test_a_window_that_is_refused(
    start: Start, server: Nbdmirror, folder: Path, disk: Path, identical: Identical
) -> None:
    """Neither image nor journal is touched."""
    far = FarSide(start, folder, ring=RING_BYTES)
    before = [shutil.copy(path, f"{path}.before") for path in (far.image, far.journal)]
    uri, journal = far.image_server.uri(), far.journal_server.uri()
    text = "Parameter 'x-nbdmirror-keep' expects 0 to 86400 seconds: 86400 intervals"
    mirror = {"mode": "existing", "device": "disk0", "target": uri, "sync": "full"}
    points = mirror | {"copy_mode": "points", "x_nbdmirror_journal": journal}
    for keep_s in (-1, 86401):
        refused = server.qmp.refusal("drive-mirror", **points, x_nbdmirror_keep=keep_s)
        assert refused == text
    refused = server.qmp.refusal("drive-mirror", **mirror, x_nbdmirror_keep=1)
    assert refused == "Parameter 'x-nbdmirror-keep' needs copy-mode 'points'"
    argv = ("mirror", uri, "--journal", journal, "--qmp", str(server.qmp_path))
    done = nbdmirror(*argv, "--keep", "4 hours")
    assert done.returncode == 2 and "'4 hours' is not a time" in done.stderr
    done = nbdmirror(*argv, "--keep", "48h")
    typed = text.replace("Parameter 'x-nbdmirror-keep'", "--keep")
    assert (done.returncode, done.stderr) == (1, f"nbdmirror: {typed}\n")
    for path, copy in zip((far.image, far.journal), before, strict=True):
        identical(path, Path(copy))
