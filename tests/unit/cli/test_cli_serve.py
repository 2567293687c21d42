"""What `nbdmirror serve` makes of its options."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from unit.cli.cliparts import Main, one_line

from nbdmirror import unix_sockets as sockets
from nbdmirror.cli import common
from nbdmirror.cli import main as cli
from nbdmirror.cli import serve as cli_serve


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cli_serve, "plugin_path", lambda: "/p/plugin.py")
    monkeypatch.setenv("NBDMIRROR_QMP", "/q/qmp")
    return "/p/plugin.py"


def command(*argv: str, extra: tuple[str, ...] = (), **environ: str) -> tuple[list[str], Any]:
    args = cli.build_parser().parse_args(["serve", *argv])
    args.nbdkit_args = list(extra)
    return cli_serve.serve_command(args, environ)


def test_serve_command(plugin: str) -> None:
    here = os.getcwd()
    argv, env = command("a.img", PYTHONPATH="/mine:/mine")
    assert argv == [
        *["nbdkit", "-i", "127.0.0.1", "-p", "10809", "-f", "-t", "8", "python", plugin],
        *[f"file={here}/a.img", "qmp=/q/qmp"],
    ]
    parts = env["PYTHONPATH"].split(":")
    assert parts[0] == str(cli_serve.PACKAGE.parent)
    assert parts[-1] == "/mine"
    assert len(parts) == len(set(parts))
    options = (
        "vm=/d/a b=nbd+unix:///x?socket=s ./c=d.img nbd://h/e=f --socket s --qmp q --threads 4"
    )
    options += " --tls-psk k --read-only --cache none --mirror-to nbd://t --daemonize --pidfile p"
    argv, _ = command(*options.split(), extra=("--filter", "delay", "rdelay=1", "-v"))
    assert argv == [
        *["nbdkit", "-U", f"{here}/s", "--tls=require", f"--tls-psk={here}/k", "--log=stderr"],
        *[
            "-t",
            "4",
            "-P",
            f"{here}/p",
            "-r",
            "--filter",
            "delay",
            "-v",
            "python",
            plugin,
            "file=vm=/d/a",
        ],
        *[f"file=b=nbd+unix:///x?socket={here}/s", f"file={here}/c=d.img", "file=nbd://h/e=f"],
        *[f"qmp={here}/q", "cache=none", f"pidfile={here}/p", "mirror-to=nbd://t"],
        *["read-only=true", "rdelay=1"],
    ]


def test_a_path_behind_a_link_stays_what_it_is(plugin: str) -> None:
    """The kernel follows the link first, and this is another file than d.img of this directory."""
    places = [f"{start}link/../{{}}" for start in ("", "/srv/")]
    for place in places:
        said = place.format
        options = ["--qmp", said("q"), "--socket", said("s"), "--pidfile", said("p")]
        options += ["--state-dir", said("state"), "--tls-certificates", said("keys")]
        argv, _ = command(said("d.img"), f"b=nbd+unix:///?socket={said('t')}", *options)
        start = "" if place.startswith("/") else f"{os.getcwd()}/"
        for name in ("q", "s", "p", "state", "keys", "d.img", "t"):
            found = [word for word in argv if word.endswith(f"/{name}")]
            assert found and all(word.endswith(start + said(name)) for word in found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nbd://h:99999/"], "from 1 to 65535"),
        (["a.img", "--mirror-to", "t.img"], "--mirror-to 't.img' is not an NBD URI"),
        (["a.img", "--address", ""], "listen on all addresses"),
        (["a.img", "--address", "[]"], "listen on all addresses"),
        (["vda="], "names no disk"),
        ([""], "names no disk"),
        ([f"{'n' * 201}=a.img"], "the name is too long: a disk's name begins"),
    ],
)
def test_what_it_refuses(plugin: str, arguments: list[str], words: str) -> None:
    with pytest.raises(common.CliError) as caught:
        command(*arguments)
    assert words in str(caught.value)


def test_an_address_in_brackets(plugin: str) -> None:
    argv, _ = command("a.img", "--address", "[::1]")
    assert argv[1:3] == ["-i", "::1"]


def test_who_it_becomes(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    nobody = pwd.getpwnam("nobody")
    both = ["-u", str(nobody.pw_uid), "-g", str(nobody.pw_gid)]
    for options, expected in (
        (["--user", "nobody"], both),
        (["--group", str(nobody.pw_gid)], both[2:]),
        (["--user", str(nobody.pw_uid), "--group", "7654"], [*both[:3], "7654"]),
    ):
        argv, _ = command("a.img", *options)
        before_plugin = argv[argv.index("-f") + 1 : argv.index("python")]
        assert before_plugin == ["-t", "8", *expected]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(common.CliError, match="only root can run as another user"):
        command("a.img", "--user", "nobody")


@pytest.mark.parametrize("said", ["nobody-at-all", "²", "-1", "4294967295", "1" * 5000])
def test_users_that_there_are_not(plugin: str, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for option in ("--user", "--group"):
        with pytest.raises(common.CliError, match="no such"):
            command("a.img", f"{option}={said}")


def test_names_are_unique(plugin: str) -> None:
    with pytest.raises(common.CliError, match="disk1 is taken"):
        command("disk1=a", "b")


NBDKIT = """#!/bin/sh
if [ "$2" = --dump-plugin ]; then printf 'version=1.32.5\\npython_version=%s\\n'; exit %d; fi
echo "$PYTHONPATH"; printf '%%s\\n' "$@"
"""


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk, a place for sockets, and an nbdkit that prints its arguments."""
    (tmp_path / "bin").mkdir()
    set_nbdkit(tmp_path, f"{sys.version_info.major}.{sys.version_info.minor}.77", 0)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("NBDMIRROR_QMP", str(tmp_path / "qmp"))
    monkeypatch.setattr(cli_serve, "plugin_path", lambda: "/p/plugin.py")
    (tmp_path / "disk").write_bytes(bytes(512))
    return tmp_path / "disk"


def set_nbdkit(tmp_path: Path, version: str, status: int) -> None:
    (tmp_path / "bin" / "nbdkit").write_text(NBDKIT % (version, status))
    (tmp_path / "bin" / "nbdkit").chmod(stat.S_IRWXU)


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What serve would have become: (file, argv, env)."""
    become: list[Any] = []

    def execvpe(file: str, argv: list[str], env: dict[str, str]) -> None:
        become.append((file, argv, env))
        raise OSError(8, "Exec format error")

    monkeypatch.setattr(os, "execvpe", execvpe)
    return become


def test_serve_becomes_nbdkit(disk: Path, run: Main, become: list[Any]) -> None:
    stale = disk.parent / "s"
    sockets.bind_unix_socket(str(stale)).close()
    status, _, err = run("serve", str(disk), "--socket", str(stale), "--", "-v")
    assert (status, "Exec format error" in one_line(err)) == (common.FAILED, True)
    assert become[0][1][:4] == ["nbdkit", "-U", str(stale), "-f"]
    assert "-v" in become[0][1]
    assert not stale.exists()


def test_threads_of_a_connection(disk: Path, run: Main, become: list[Any]) -> None:
    """Several guests' disks have one with an nbdkit that a guest's end may end."""
    several = ("a=" + str(disk), "b=" + str(disk))

    def threads(*options: str) -> str:
        run("serve", *options, "--socket", str(disk.parent / "s"))
        argv = become.pop()[1]
        return str(argv[argv.index("-t") + 1])

    assert threads(str(disk)) == "8"
    assert threads(str(disk), "--cache", "none") == "16"
    assert threads(*several) == threads(*several, "--cache", "none") == "1"
    assert threads(*several, "--threads", "4") == "4"
    script = disk.parent / "bin" / "nbdkit"
    script.write_text(script.read_text().replace("1.32.5", "1.34.0"))
    assert threads(*several) == "8"


def test_serve_refuses_what_cannot_work(disk: Path, run: Main) -> None:
    here = disk.parent

    def refused(*options: str, disk: str = str(disk)) -> str:
        status, out, err = run("serve", disk, *options)
        assert (status, out) == (common.FAILED, "")
        return one_line(err)

    assert "no such disk" in refused(disk=str(here / "none"))
    assert "is a directory" in refused(disk=str(here))
    (here / "file").write_text("precious")
    assert "is not a socket" in refused("--socket", str(here / "file"))
    assert "is not a socket" in refused("--qmp", str(here / "file"))
    assert (here / "file").read_text() == "precious"
    assert "directory does not exist" in refused("--socket", str(here / "no" / "s"))
    assert "107 bytes" in refused("--socket", str(here / ("x" * 108)))
    assert "the same path" in refused("--socket", str(here / "q"), "--qmp", str(here / "q"))
    assert "the same path" in refused("--qmp", str(here / "q"), "--pidfile", str(here / "q"))
    os.symlink("gone.img", here / "link")
    assert "a link to gone.img, which does not exist" in refused(disk=str(here / "link"))
    os.symlink("circle", here / "circle")
    assert "Too many levels" in refused(disk=str(here / "circle"))
    assert "No such file" in refused("--tls-psk", str(here / "none"))
    with sockets.bind_unix_socket(str(here / "live")):
        assert "in use" in refused("--socket", str(here / "live"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert "in use" in refused("--port", str(listener.getsockname()[1]))
    set_nbdkit(here, "3.1", 0)
    assert "nbdkit's Python is 3.1," in refused()
    set_nbdkit(here, "3.11", 1)
    assert "nbdkit-plugin-python" in refused()
    os.environ["PATH"] = str(here)
    assert "nbdkit is not installed" in refused()


def test_places_of_another_user(disk: Path, run: Main) -> None:
    """What may not be looked at is not called missing, and nothing is made before it is known that
    everything can be."""
    here = disk.parent
    (here / "closed").mkdir(mode=0o555)
    shutil.copy(disk, here / "closed")
    user = os.geteuid()

    def refused(*options: str, disk: str = str(disk)) -> str:
        if user == 0:
            os.seteuid(65534)
        try:
            status, _, err = run("serve", disk, *options)
        finally:
            os.seteuid(user)
        assert status == common.FAILED
        assert {path.name for path in here.iterdir()} == before
        return one_line(err)

    before = {path.name for path in here.iterdir()}
    # pytest's folders are its user's alone; each of several workers has one more.
    above = [path for path in here.parents if path.name.startswith(("pytest-", "popen-"))]
    for folder in (here, *above, here / "bin" / "nbdkit"):
        folder.chmod(0o755)
    for option in ("--socket", "--qmp", "--pidfile"):
        # The open one is given too, and would be made first.
        options = {"--qmp": "/var/tmp/q", option: str(here / "closed" / "place")}
        said = refused(*[word for pair in options.items() for word in pair])
        assert option in said and "cannot be created: Permission denied" in said
    (here / "closed").chmod(0)
    assert "Permission denied" in refused(disk=str(here / "closed" / disk.name))


def test_the_real_nbdkit_has_our_python() -> None:
    if not shutil.which("nbdkit"):
        pytest.skip("nbdkit is not installed")
    cli_serve._check_nbdkit(os.environ)


def test_plugin_path(run: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "nbdmirror"
    monkeypatch.setattr(cli_serve, "PACKAGE", package)
    status, _, err = run("plugin-path")
    assert (status, "install nbdmirror again" in one_line(err)) == (common.FAILED, True)
    for folder in (package / "_plugin", tmp_path / "plugin"):
        folder.mkdir(parents=True)
        (folder / "nbdmirror-plugin.py").touch()
        assert run("plugin-path")[:2] == (common.DONE, f"{folder}/nbdmirror-plugin.py\n")
