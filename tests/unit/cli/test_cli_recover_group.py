"""`nbdmirror recover --group` on files: what it prints, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from unit.cli.cliparts import Main, one_line
from unit.points.guestparts import Guest, a_guest

from nbdmirror.cli.points import AGAIN


class Files:
    """Image and journal of each disk. `argv`: the options that name them."""

    def __init__(self, folder: Path, guest: Guest) -> None:
        self.guest = guest
        self.argv: list[str] = []
        for far, name in zip(guest.fars, "abc", strict=False):
            for option, data in (("image", far.image.data), ("journal", far.journal.data)):
                path = folder / f"{option}-{name}"
                path.write_bytes(data)
                self.argv += [f"--{option}", str(path)]
        self.places = [Path(path) for path in self.argv[1::2]]

    @property
    def images(self) -> list[bytes]:
        return [path.read_bytes() for path in self.places[::2]]

    def recover(self, run: Main, *more: str) -> tuple[int, str, str]:
        return run("recover", "--group", *self.argv, *more)

    def check_untouched(self) -> None:
        assert [path.read_bytes() for path in self.places] == self.guest.everything()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setenv("TZ", "UTC")
    return Files(tmp_path, a_guest())


def test_the_newest_moment_is_recovered_and_said(files: Files, run: Main) -> None:
    status, out, err = files.recover(run)
    at = "1970-01-01 00:00:05.000+0000"
    image, _, other, _ = files.places
    assert (status, out) == (0, f"{image} is point 4 of {at}\n{other} is point 4 of {at}\n")
    assert err.startswith(f"recovering 2 disks at {at}\nrecovering point 4 of {at}, ")
    assert files.images == files.guest.moments[13]
    status, out, err = files.recover(run)
    assert status == 0 and out.count(": nothing was changed now\n") == 2
    assert err == f"recovering 2 disks at {at}\n"


@pytest.mark.parametrize("wanted", ["nightly", "1970-01-01 00:00:02.000+0000"])
def test_a_moment_by_name_and_time(files: Files, run: Main, wanted: str) -> None:
    status, out, err = files.recover(run, "--point", wanted)
    assert status == 0, err
    assert "is point 2 (nightly) of" in out and "is point 1 (nightly) of" in out
    assert files.images == files.guest.moments[11]


def test_images_first_and_then_journals(files: Files, run: Main) -> None:
    image, journal, *others = [files.argv[at : at + 2] for at in range(0, 8, 2)]
    argv = [*image, *others[0], *journal, *others[1]]
    assert run("recover", "--group", *argv)[0] == 0
    assert files.images == files.guest.moments[13]


def test_the_number_of_the_group_is_in_the_list(files: Files, run: Main) -> None:
    status, out, _ = run("points", str(files.places[1]))
    assert status == 0
    assert out.splitlines()[1:4] == [
        "  point  time                            size  group  name",
        "      1  1970-01-01 00:00:01.000+0000  24 KiB      -",
        "      2  1970-01-01 00:00:02.000+0000  24 KiB     11  nightly",
    ]
    _, out, _ = run("points", "--json", str(files.places[3]))
    found = {point["group"]: point["sequence"] for point in json.loads(out)["points"]}
    assert found[11] == 1 and found[13] == 4


def test_wrong_numbers_of_disks(files: Files, run: Main) -> None:
    image, journal, other, _ = (str(place) for place in files.places)
    one = ["--image", image, "--journal", journal]
    more = "several disks are recovered with --group"
    cases = {
        ("--group", *one): "--group: needs images and journals of two disks at least",
        (*one, "--image", other): f"--image: is given twice: {more}",
        (*one, "--journal", other): f"--journal: is given twice: {more}",
        (*files.argv,): f"--image: is given twice: {more}",
        ("--group", *one, "--image", other): "--group: each image needs its journal: "
        "--image is given 2 times, and --journal 1 times",
    }
    for argv, message in cases.items():
        status, out, err = run("recover", *argv)
        assert (status, out) == (2, ""), message
        assert one_line(err) == f"nbdmirror: {message}\n"
        files.check_untouched()


def test_a_disk_that_is_named_twice(files: Files, run: Main, tmp_path: Path) -> None:
    image, journal, other, second = (str(place) for place in files.places)
    os.symlink(image, tmp_path / "link")
    link = str(tmp_path / "link")
    cases = {
        (image, journal, link, second): f"--image: names the same disk as --image {image}: {link}",
        (image, journal, other, journal): f"--journal: names the same disk as --journal {journal}: "
        f"{journal}",
        (image, journal, other, image): f"--journal: names the same disk as --image {image}: "
        f"{image}",
        (image, image, other, second): "--journal: names the same disk as --image",
    }
    for (one, its, two, its_own), message in cases.items():
        argv = ("--image", one, "--journal", its, "--image", two, "--journal", its_own)
        status, out, err = run("recover", "--group", *argv)
        assert (status, out) == (1, ""), message
        assert one_line(err).startswith(f"nbdmirror: {message}")
        files.check_untouched()


def test_a_number_is_refused(files: Files, run: Main) -> None:
    status, out, err = files.recover(run, "--point", "4")
    assert (status, out) == (1, "")
    assert one_line(err).startswith("nbdmirror: --point 4: the points of one moment have other")
    files.check_untouched()


def test_what_all_journals_have_is_said_in_one_line(
    tmp_path: Path, run: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    guest = Guest()
    for group in (1, 2):
        guest.point(guest.fars[0], group)
        guest.point(guest.fars[1])
    files = Files(tmp_path, guest)
    status, out, err = files.recover(run)
    assert (status, out) == (1, "")
    _, journal, _, other = files.places
    assert one_line(err) == (
        f"nbdmirror: no moment is in all journals: {journal}: 2 of 2 points are of a group, "
        f"1970-01-01 00:00:01.000+0000 to 1970-01-01 00:00:03.000+0000; "
        f"{other}: 0 of 2 points are of a group\n"
    )
    files.check_untouched()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_empty_name_of_a_disk(files: Files, run: Main, at: int) -> None:
    argv = list(files.argv)
    argv[2 * at + 1] = ""
    status, out, err = run("recover", "--group", *argv)
    assert (status, out) == (2, "")
    assert "is empty" in one_line(err)
    files.check_untouched()


def test_an_error_of_a_file_names_the_disk(
    files: Files, run: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: object, *arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("nbdmirror.devices.file.FileDevice.flush", fails)
    status, out, err = files.recover(run)
    assert (status, out) == (1, "")
    image, journal, *_ = files.places
    text = f"{image} or {journal}: Input/output error; {AGAIN}\n"
    assert err.splitlines(keepends=True)[-1] == f"nbdmirror: {text}"
    monkeypatch.undo()
    monkeypatch.setenv("TZ", "UTC")
    assert files.recover(run)[0] == 0
    assert files.images == files.guest.moments[13]
