"""A path means the same file in every directory, as the kernel reads it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from support.seeds import SEED

from nbdmirror.paths import absolute_path

STEPS = ("..", ".", "", "link", "folder", "file")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory whose `link` leads to another one, which has the same names. From there two `..`
    lead past the links."""
    here, there = tmp_path / "a" / "here", tmp_path / "b" / "c" / "there"
    for place in (here, there, here.parent, there.parent, tmp_path / "b", tmp_path):
        (place / "folder").mkdir(parents=True)
        (place / "folder" / "file").write_text(str(place))
        (place / "file").write_text(str(place))
    (here / "link").symlink_to(there / "folder")
    (there / "link").symlink_to(here)
    return here


def inode(path: str) -> int:
    """0: there is no such file."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def test_any_path_is_the_kernels(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(SEED)
    meant = {}
    monkeypatch.chdir(here)
    for _ in range(2000):
        path = "/".join(rng.choices(STEPS, k=rng.randint(1, 6)))
        for spelled in (path or ".", f"{here}/{path}"):
            if found := inode(spelled):
                meant[absolute_path(spelled)] = found
    monkeypatch.chdir("/")
    assert len(set(meant.values())) > 10, "many files were meant"
    assert {path: inode(path) for path in meant} == meant


@pytest.mark.parametrize(
    ("path", "absolute"),
    [
        ("disk", "/srv/vm/disk"),
        ("./a//b/.", "/srv/vm/a/b"),
        ("../disk", "/srv/disk"),
        ("./../../../..//disk", "/disk"),
        ("link/../disk", "/srv/vm/link/../disk"),
        ("../link/../disk", "/srv/link/../disk"),
        ("/data/link/../disk", "/data/link/../disk"),
        ("//data/./disk/", "/data/disk"),
        (".", "/srv/vm"),
        ("/", "/"),
    ],
)
def test_what_can_be_left_out_is(path: str, absolute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Unix socket's path is short."""
    monkeypatch.setattr(os, "getcwd", lambda: "/srv/vm")
    assert absolute_path(path) == absolute
    assert absolute_path(absolute) == absolute


def test_in_a_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert absolute_path("/srv/disk") == "/srv/disk"
    with pytest.raises(FileNotFoundError):
        absolute_path("disk")
