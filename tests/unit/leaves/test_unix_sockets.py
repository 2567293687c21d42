"""Sockets and other files in directories where others may write: nothing is followed or taken away
that is not ours. As root these tests have another user to play tricks; else they say so."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdmirror import unix_sockets as sockets
from nbdmirror.errors import ConfigError
from nbdmirror.state.sealed_files import DiskFolder

NOBODY = 65534
IS_ROOT = os.geteuid() == 0
other_user = pytest.mark.skipif(not IS_ROOT, reason="only root can make files of another user")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory as /tmp is."""
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o1777)
    return place


@pytest.fixture
def open_to_all(tmp_path: Path) -> Path:
    """The same without the sticky bit."""
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(0o777)
    return place


def dead_socket(path: Path, owner: int | None = None) -> Path:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    if owner is not None:
        os.chown(path, owner, owner)
    return path


def refused(path: Path) -> str:
    """What is said of a place that is left as it is."""
    before = os.lstat(path)
    with pytest.raises(ConfigError, match=f"^qmp: {path}: ") as caught:
        sockets.bind_unix_socket(str(path))
    after = os.lstat(path)
    assert os.path.samestat(before, after) and before.st_mtime_ns == after.st_mtime_ns
    return str(caught.value)


# Sockets


def test_our_own_dead_socket_is_taken_over_anywhere(shared: Path, open_to_all: Path) -> None:
    for place in (shared, open_to_all):
        path = dead_socket(place / "s")
        with sockets.bind_unix_socket(str(path)):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


@other_user
def test_another_users_dead_socket_is_left_alone(shared: Path, open_to_all: Path) -> None:
    for place in (shared, open_to_all):
        said = refused(dead_socket(place / "s", NOBODY))
        assert "a dead socket of user nobody" in said and "left alone" in said


@other_user
def test_in_a_directory_of_our_own_any_dead_socket_is_taken_over(tmp_path: Path) -> None:
    """As one that root left to a server that drops its privileges."""
    with sockets.bind_unix_socket(str(dead_socket(tmp_path / "s", NOBODY))):
        pass


@other_user
def test_in_another_users_directory_his_own_is_taken_over_and_no_other(tmp_path: Path) -> None:
    place = tmp_path / "his"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    with sockets.bind_unix_socket(str(dead_socket(place / "s", NOBODY))):
        pass
    assert "a dead socket of user" in refused(dead_socket(place / "t", 12345))


@other_user
def test_another_users_live_socket_is_in_use(shared: Path) -> None:
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(shared / "s"))
        os.chown(shared / "s", NOBODY, NOBODY)
        theirs.listen()
        assert "in use" in refused(shared / "s")


def test_a_symbolic_link_is_not_followed(shared: Path, tmp_path: Path) -> None:
    """Neither to a dead socket, which would be taken away, nor to nothing, which would be made."""
    victim = dead_socket(tmp_path / "victim")
    (shared / "to-socket").symlink_to(victim)
    (shared / "to-nothing").symlink_to(tmp_path / "made")
    for name in ("to-socket", "to-nothing"):
        assert "is not a socket" in refused(shared / name)
    assert victim.exists() and not (tmp_path / "made").exists()


def test_a_directory_that_becomes_a_link_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the socket and its removal the directory is exchanged: what goes is what
    was looked at, not what has its name now."""
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    dead_socket(place / "s")
    victim = dead_socket(elsewhere / "s")
    unlink = os.unlink

    def exchange(name: str, *, dir_fd: int | None = None) -> None:
        place.rename(tmp_path / "moved")
        place.symlink_to(elsewhere)
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", exchange)
    sockets.check_socket(str(place / "s"), "qmp", remove=True)
    assert victim.exists()
    assert not (tmp_path / "moved" / "s").exists()


def test_only_the_socket_that_we_made_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    sockets.bind_unix_socket(str(path)).close()
    ours = os.lstat(path)
    path.rename(tmp_path / "kept")  # else a new file may have the same number
    path.write_text("another one's")
    sockets.remove_socket(str(path), ours)
    assert path.read_text() == "another one's"
    path.unlink()
    path.symlink_to(tmp_path / "kept")
    sockets.remove_socket(str(path), ours)
    assert path.is_symlink() and (tmp_path / "kept").exists()
    path.unlink()
    (tmp_path / "kept").rename(path)
    sockets.remove_socket(str(path), ours)
    assert not path.exists()
    sockets.remove_socket(str(path), ours)


def test_many_servers_that_find_one_dead_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them gets it, and its new socket is not taken for the dead one by any other."""
    monkeypatch.setattr(sockets, "LOCK_S_MAX", 60.0)
    path = str(dead_socket(tmp_path / "s"))
    barrier = threading.Barrier(8)
    bound: list[socket.socket] = []
    said: list[str] = []

    def start() -> None:
        barrier.wait(60)
        try:
            bound.append(sockets.bind_unix_socket(path))
        except ConfigError as error:
            said.append(str(error))

    for _ in range(20):
        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        (winner,) = bound
        assert len(said) == 7 and all("in use" in text for text in said), said
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
        winner.close()
        bound.clear()
        said.clear()


def test_somebody_who_holds_the_directorys_lock_delays_and_does_not_prevent(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "LOCK_S_MAX", 0.1)
    with sockets._locked(str(shared / "s")):
        began_s = time.monotonic()
        sockets.bind_unix_socket(str(shared / "s")).close()
        assert time.monotonic() - began_s < 5


# The file with the process's number


def claim(path: Path) -> str:
    try:
        sockets.claim_pidfile(str(path), "--pidfile")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(params=["own", "shared"])
def place(request: pytest.FixtureRequest, tmp_path: Path, shared: Path) -> Path:
    return tmp_path if request.param == "own" else shared


@pytest.mark.parametrize("content", [b"\0" * 4096, b"QFI\xfb", b"12 of my files"])
def test_a_pidfile_that_may_be_somebodys_disk(place: Path, content: bytes) -> None:
    path = place / "disk.img"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="contains no process ID; it was left alone"):
        sockets.claim_pidfile(str(path), "--pidfile")
    assert path.read_bytes() == content
    path.write_text(" 4711\n")
    sockets.claim_pidfile(str(path), "--pidfile")


def test_a_pidfile_that_is_there_or_not(place: Path) -> None:
    assert not claim(place / "pid")
    (place / "pid").write_text("123\n")
    assert not claim(place / "pid")
    assert (place / "pid").read_text() == "123\n"


def test_in_a_shared_directory_the_pidfile_is_ours_at_once(shared: Path, tmp_path: Path) -> None:
    """And it is said whether it was made."""
    sockets.check_pidfile(str(shared / "pid"), "--pidfile")
    assert not (shared / "pid").exists()
    made = sockets.claim_pidfile(str(shared / "pid"), "--pidfile")
    assert made is not None
    assert os.path.samestat(made, (shared / "pid").stat())
    assert sockets.claim_pidfile(str(shared / "pid"), "--pidfile") is None
    assert (shared / "pid").stat().st_uid == os.geteuid()
    assert not claim(tmp_path / "pid")
    assert not (tmp_path / "pid").exists()


def make_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def make_dangling_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim.with_name("nowhere"))


def make_second_name(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def make_fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def make_directory(path: Path, victim: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    "make", [make_link, make_dangling_link, make_second_name, make_fifo, make_directory]
)
def test_a_pidfile_that_is_a_trap(
    place: Path, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    make(place / "pid", victim)
    assert "left alone" in claim(place / "pid")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@other_user
def test_another_users_pidfile_in_a_shared_directory(shared: Path) -> None:
    (shared / "pid").write_text("1\n")
    os.chown(shared / "pid", NOBODY, NOBODY)
    assert "belongs to user nobody" in claim(shared / "pid")


def test_a_pidfile_in_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "its directory does not exist" in claim(tmp_path / "no" / "pid")


# The state directory


def test_a_state_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    for mode in (0o777, 0o1777):
        place = tmp_path / f"{mode:o}"
        place.mkdir()
        place.chmod(mode)
        with pytest.raises(ConfigError, match="others may write to it"):
            DiskFolder(place)


def test_state_files_are_their_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = DiskFolder(tmp_path / "state")
        folder.prepare("a", b"x")
        folder.commit(["a"])
        folder.slots("b", 512, 2).close()
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "state").iterdir()}
    assert modes == {"a": 0o600, "b": 0o600, "lock": 0o600}
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    folder.close()


def test_state_files_are_not_looked_for_behind_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    folder = DiskFolder(tmp_path / "state")
    for name in ("read", "a.new", "slots"):
        (tmp_path / "state" / name).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        folder.read("read")
    folder.prepare("a", b"x")
    with pytest.raises(OSError, match="symbolic link"):
        folder.slots("slots", 512, 2)
    assert victim.read_bytes() == b"precious"
    folder.close()
