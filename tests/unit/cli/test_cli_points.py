"""`nbdmirror points` and `nbdmirror recover` on files: what they print, and what they refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from unit.cli.cliparts import Main, one_line
from unit.points.pointparts import FarSide, with_points

from nbdmirror.devices.image_lock import lock_image
from nbdmirror.points.format import RING_START, SLOTS


class Places:
    """A far side in files."""

    def __init__(self, folder: Path, far: FarSide) -> None:
        self.far = far
        self.image, self.journal = folder / "image", folder / "journal"
        self.save()

    def save(self) -> None:
        self.image.write_bytes(self.far.image.data)
        self.journal.write_bytes(self.far.journal.data)

    def recover(self, run: Main, *more: str) -> tuple[int, str, str]:
        return run("recover", "--image", str(self.image), "--journal", str(self.journal), *more)

    def check_untouched(self) -> None:
        assert self.image.read_bytes() == self.far.image.data
        assert self.journal.read_bytes() == self.far.journal.data


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    monkeypatch.setenv("TZ", "UTC")
    return Places(tmp_path, with_points(3))


def test_points_are_listed(places: Places, run: Main) -> None:
    places.far.apply(1)
    places.save()
    status, out, err = run("points", str(places.journal))
    assert (status, err) == (0, "")
    assert out == (
        f"{places.journal}: a disk of 64 KiB, 56 KiB of 1 MiB used; 3 points\n"
        "  point  time                            size  name\n"
        "      1  1970-01-01 00:00:01.000+0000   image  n1\n"
        "      2  1970-01-01 00:00:02.000+0000  28 KiB  n2\n"
        "      3  1970-01-01 00:00:03.000+0000  28 KiB  n3\n"
    )
    places.check_untouched()


def test_a_name_that_nbdmirror_would_not_have_written(places: Places, run: Main) -> None:
    """The journal is a file, which somebody else may have written."""
    places.far.point((0, 4096), name="n4\n\x1b[2J")
    places.save()
    assert run("points", str(places.journal))[1].endswith("  n4\\n\\x1b[2J\n")
    assert "has no point '9'" in one_line(places.recover(run, "--point", "9")[2])
    assert "is point 4 (n4\\n\\x1b[2J) of" in places.recover(run)[1]


def test_points_as_json(places: Places, run: Main) -> None:
    status, out, err = run("points", "--json", str(places.journal))
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["state"] == "ok"
    assert found["disk-bytes"] == 64 << 10
    assert found["ring-bytes"] == 1 << 20
    assert found["used-bytes"] == sum(point["bytes"] for point in found["points"]) == 84 << 10
    assert [point["sequence"] for point in found["points"]] == [1, 2, 3]
    assert found["points"][1]["name"] == "n2"
    assert found["points"][1]["time"] == "1970-01-01 00:00:02.000+0000"
    assert found["damage"] == []


@pytest.mark.parametrize("which", [None, "1", "n2", "1970-01-01 00:00:02.000+0000"])
def test_a_point_is_recovered(places: Places, run: Main, which: str | None) -> None:
    sequence = {None: 3, "1": 1}.get(which, 2)
    more = () if which is None else ("--point", which)
    status, out, err = places.recover(run, *more)
    at = f"1970-01-01 00:00:0{sequence}.000+0000"
    assert status == 0
    assert out == f"{places.image} is point {sequence} (n{sequence}) of {at}\n"
    assert err == f"recovering point {sequence} of {at}, {16 * sequence} KiB\n"
    assert places.image.read_bytes() == places.far.contents[sequence]
    status, out, err = places.recover(run)
    assert (status, err) == (0, "")
    assert out.startswith(f"{places.image} was made point {sequence} (n{sequence}) of {at} before")
    assert out.endswith(": nothing was changed now\n")
    assert " is point" not in out, "guests may have written to it since"
    status, out, err = run("points", str(places.journal))
    assert status == 0
    assert "recovered at" in out and "point" in out


def test_each_time_that_is_listed_names_its_point(places: Places, run: Main) -> None:
    far = places.far
    for time_ns in (4_000_000_001, 4_999_999_999, 1_796_000_000_123_456_789):
        far.writer.begin(time_ns, bytes_max=0)
        far.commit()
    places.save()
    _, out, _ = run("points", "--json", str(places.journal))
    for point in json.loads(out)["points"]:
        places.save()
        status, out, _ = places.recover(run, "--point", point["time"])
        assert status == 0
        assert f" is point {point['sequence']} " in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--point", "4"), "has no point '4': it has 1 to 3"),
        (("--point", "0"), "has no point '0': it has 1 to 3"),
        (("--point", "weekly"), "has no point 'weekly': it has 1 to 3"),
        (("--point", "1969-12-31"), "has no point '1969-12-31': it has 1970-01-01 00:00:01.000"),
    ],
)
def test_no_such_point(places: Places, run: Main, more: tuple[str, ...], message: str) -> None:
    status, out, err = places.recover(run, *more)
    assert (status, out) == (1, "")
    assert f"nbdmirror: {places.journal}: {message}" in one_line(err)
    places.check_untouched()


def test_disks_that_cannot_be_used(places: Places, run: Main, tmp_path: Path) -> None:
    image, journal = str(places.image), str(places.journal)
    empty, foreign, small = (str(tmp_path / name) for name in ("empty", "foreign", "small"))
    Path(empty).write_bytes(bytes(2 << 20))
    Path(foreign).write_bytes(b"\x55" * (2 << 20))
    Path(small).write_bytes(bytes(4096))
    os.symlink(image, tmp_path / "link")
    cases = {
        (image, image): "--journal: names the same disk as --image",
        (image, str(tmp_path / "link")): "--journal: names the same disk as --image",
        ("nbd://h/x", "nbd://h:10809/x"): "--journal: names the same disk as --image",
        (image, empty): f"{empty}: is not a journal: it is empty",
        (image, foreign): f"{foreign}: is not a journal: it holds something else",
        (image, small): f"{small}: is not a journal: it has only 4096 bytes",
        (journal, image): f"{image}: is not a journal: it has only 65536 bytes",
        (small, journal): f"{journal}: is the journal of another disk than the image: it has 4096",
        (image, str(tmp_path)): f"--journal: {tmp_path}: is a directory, not a disk",
        (str(tmp_path / "none"), journal): f"--image: {tmp_path}/none: no such disk",
        (image, "nbd://h:x/"): "--journal: nbd://h:x/: the port 'x' is not a number",
        ("nbd+unix:///?socket=/nowhere/s", journal): "--image: Failed to connect to 'nbd+unix",
    }
    for (one, other), message in cases.items():
        status, out, err = run("recover", "--image", one, "--journal", other)
        assert (status, out) == (1, ""), message
        assert one_line(err).startswith(f"nbdmirror: {message}")
        places.check_untouched()


@pytest.mark.parametrize("which", ["image", "journal"])
def test_a_disk_that_a_server_has_is_refused(places: Places, run: Main, which: str) -> None:
    path = str(getattr(places, which))
    fd = os.open(path, os.O_RDWR)
    lock_image(fd, path, read_only=False)
    status, out, err = places.recover(run)
    os.close(fd)
    assert (status, out) == (1, "")
    assert one_line(err).startswith(f"nbdmirror: --{which}: {path}: is in use by another process")
    places.check_untouched()


def test_damage_is_told(places: Places, run: Main) -> None:
    footer = RING_START + places.far.writer.headers[2].footer_place
    places.far.journal.data[footer + 20] ^= 1
    places.save()
    line = f"nbdmirror: {places.journal}: point 3 is lost: the footer of point 3 is damaged"
    status, out, err = run("points", str(places.journal))
    assert status == 1
    assert "2 points" in out
    assert one_line(err).startswith(line)
    status, out, err = places.recover(run)
    assert (status, out) == (1, "")
    assert one_line(err).startswith(line)
    assert err.endswith("name it with --point 2\n")
    places.check_untouched()
    status, _, err = places.recover(run, "--point", "2")
    assert status == 0
    assert err.startswith("nbdmirror: warning: ")
    assert places.image.read_bytes() == places.far.contents[2]


def test_a_damaged_superblock_is_told_and_does_no_harm(places: Places, run: Main) -> None:
    places.far.journal.data[SLOTS[1] + 300] ^= 1
    places.save()
    status, out, err = run("points", str(places.journal))
    assert status == 1
    assert "3 points" in out
    assert "superblock B is damaged: its checksum is wrong" in one_line(err)
    status, _, _ = places.recover(run)
    assert status == 0
    assert places.image.read_bytes() == places.far.contents[3]


@pytest.mark.parametrize("argv", [("points", ""), ("recover", "--image", "", "--journal", "x")])
def test_empty_values(run: Main, argv: tuple[str, ...]) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert "is empty" in one_line(err)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ((), "points: give either JOURNAL, to list its points, or --exec COMMAND"),
        (("--exec", "true", "JOURNAL"), "points: give either JOURNAL, to list its points"),
        (("--exec", "true", "--json"), "--json: not allowed with --exec"),
        (("JOURNAL", "--device", "vda"), "--device: not allowed with JOURNAL"),
        (("JOURNAL", "--job", "vda"), "--job: not allowed with JOURNAL"),
        (("JOURNAL", "--qmp", "/nowhere"), "--qmp: not allowed with JOURNAL"),
        (("--exec", ""), "--exec: is empty"),
    ],
)
def test_one_of_the_two_forms(run: Main, argv: tuple[str, ...], text: str) -> None:
    status, out, err = run("points", *argv)
    assert (status, out) == (2, "")
    assert text in one_line(err)
