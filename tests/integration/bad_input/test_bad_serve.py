"""Disks, parameters and places that `serve`, or nbdkit with the plugin, cannot start with: one
clear error in the place where the user looks; a running guest never notices; nothing on the source
or the target is touched."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from integration.bad_input.badparts import SIZE, bare, one_line, serve, untouched
from support.fixtures import Start
from support.images import assert_identical, make_image
from support.processes import nbdmirror, run
from support.servers import PLUGIN, Nbdmirror, QemuNbd

# Disks that cannot be served


def test_a_missing_disk(folder: Path) -> None:
    one_line(serve(folder, folder / "nope.img"), "nope.img")
    one_line(bare(folder, f"file={folder}/nope.img"), "nope.img", "does not exist")


def test_a_missing_disk_in_the_background(folder: Path) -> None:
    """The parent says it, before it has gone."""
    done = serve(folder, folder / "nope.img", "--daemonize", "--pidfile", folder / "pid")
    one_line(done, "nope.img")
    done = run("nbdkit", "-U", folder / "s", "python", PLUGIN, "file=/nope.img", check=False)
    one_line(done, "/nope.img")
    assert not (folder / "pid").exists()


def test_a_directory(folder: Path) -> None:
    one_line(serve(folder, folder), str(folder), "directory")
    one_line(bare(folder, f"file={folder}"), str(folder), "directory")


def test_what_is_no_disk(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    one_line(serve(folder, folder / "fifo"), "fifo")
    one_line(serve(folder, "/dev/null"), "/dev/null")


def test_an_unreadable_disk(disk: Path) -> None:
    """As root, who may read anything, by way of a user who may not."""
    disk.chmod(0)
    plugin = run("nbdkit", "-f", "-U", disk.parent / "s", "python", PLUGIN, "--help", check=False)
    assert plugin.returncode == 0, plugin.stderr
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "nbdkit", "-f"]
        disk.parent.chmod(0o755)
        socket_path = disk.parent / "open" / "s"
        socket_path.parent.mkdir()
        socket_path.parent.chmod(0o777)
        done = run(*command, "-U", socket_path, "python", PLUGIN, f"file={disk}", check=False)
        if re.search(r"nbdmirror-plugin.py: (cannot open file: )?Permission", done.stderr):
            pytest.skip("the checkout is not readable for other users")
        if "No module named" in done.stderr:
            pytest.skip("the virtual environment is not readable for other users")
    else:
        done = bare(disk.parent, f"file={disk}")
    one_line(done, "disk.img", "Permission denied")


@pytest.mark.parametrize(
    "uri", ["nbd+unix:///?socket=/nope.sock", "nbd://127.0.0.1:1/x", "nbd://nosuch.invalid/"]
)
def test_an_nbd_source_that_is_not_there(folder: Path, uri: str) -> None:
    one_line(serve(folder, uri), uri)


def test_an_unknown_export_as_the_source(start: Start, disk: Path) -> None:
    behind = start(QemuNbd(disk.parent, disk, export="here"))
    with untouched(disk):
        one_line(serve(disk.parent, behind.uri("elsewhere")), "elsewhere")


def test_a_read_only_nbd_source_says_what_to_do(start: Start, disk: Path) -> None:
    behind = start(QemuNbd(disk.parent, disk, read_only=True))
    one_line(serve(disk.parent, behind.uri()), "read-only")


def test_two_disks_of_one_name(disk: Path) -> None:
    one_line(serve(disk.parent, f"a={disk}", f"a={disk}"), "a")
    one_line(bare(disk.parent, f"file=a={disk}", f"file=a={disk}"), "'a'")
    one_line(serve(disk.parent, f"disk1={disk}", disk), "disk1")


@pytest.mark.guarantee("What is refused has changed nothing")
def test_a_second_disk_that_fails_leaves_nothing_started(disk: Path) -> None:
    with untouched(disk):
        one_line(serve(disk.parent, disk, disk.parent / "nope.img"), "nope.img")
        folder = disk.parent
        done = bare(folder, f"file={disk}", "file=/nope.img", f"qmp={folder}/q")
        one_line(done, "/nope.img")
        assert not (folder / "q").exists()


# Parameters


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--sokcet", "x"], "--sokcet"),
        (["--cache", "writethrough"], "writethrough"),
        (["--port", "many"], "many"),
        (["--port", "70000"], "--port"),
        (["--port", "0"], "--port"),
        (["--threads", "0"], "--threads"),
        (["--tls", "maybe"], "maybe"),
        (["--qmp"], "--qmp"),
    ],
)
def test_wrong_options_of_serve(disk: Path, arguments: list[str], word: str) -> None:
    done = nbdmirror("serve", disk, *arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert word in last and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["", "srve", "mirror", "wait", "set-speed"])
def test_wrong_commands(command: str) -> None:
    done = nbdmirror(*command.split())
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip()


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        ("fil=x", ["fil"]),
        ("filee=x", ["filee"]),
        ("qpm=x", ["qpm"]),
        ("cache=maybe", ["cache", "maybe"]),
        ("read-only=perhaps", ["read-only", "perhaps"]),
        ("mirror-to=/a/path", ["mirror-to", "/a/path"]),
        ("file=", ["file"]),
        ("qmp=/nope/q", ["qmp", "/nope/q"]),
        ("qmp=/" + "q" * 200, ["qmp", "long"]),
    ],
)
def test_wrong_plugin_parameters(disk: Path, parameter: str, words: list[str]) -> None:
    with untouched(disk):
        one_line(bare(disk.parent, f"file={disk}", parameter), *words)


def test_no_disk_at_all(folder: Path) -> None:
    one_line(bare(folder), "file=")


# Places that are taken


def test_a_tcp_port_in_use(disk: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = nbdmirror("serve", disk, "--port", str(port), "--qmp", disk.parent / "q")
        one_line(done, str(port), "in use")
        assert not (disk.parent / "q").exists()


def test_a_port_with_a_live_server_of_ours(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk, tcp=True))
    again = ("--port", str(server.port), "--qmp", disk.parent / "q")
    one_line(nbdmirror("serve", disk, *again), str(server.port))
    assert_identical(disk, server.uri())


@pytest.mark.parametrize("which", ["--socket", "--qmp"])
def test_a_live_socket_is_not_taken_over(start: Start, disk: Path, which: str) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    # To who looks whether it lives: at whichever step nbdkit finds that the caller has gone.
    server.allowed = ["sending newstyle handshake", "reading initial client flags"]
    taken = server.socket if which == "--socket" else server.qmp_path
    other = disk.parent / "other"
    places = {"--socket": other, "--qmp": other} | {which: taken}
    words = [str(word) for place in places.items() for word in place]
    one_line(nbdmirror("serve", disk, *words), which, str(taken), "in use")
    assert not other.exists()
    assert_identical(disk, server.uri())
    assert server.qmp.execute("query-status")["running"] is True


def test_a_live_control_socket_is_not_taken_over_bare(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    other = make_image(disk.parent / "other.img", SIZE)
    one_line(bare(disk.parent, f"file={other}", f"qmp={server.qmp_path}"), "qmp", "in use")
    assert server.qmp.execute("query-status")["running"] is True


def test_stale_sockets_are_taken_over(start: Start, disk: Path) -> None:
    server = Nbdmirror(disk.parent, disk)
    for path in (server.socket, server.qmp_path):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    start(server)
    assert_identical(disk, server.uri())


@pytest.mark.parametrize("which", ["--socket", "--qmp"])
def test_a_file_that_is_no_socket_is_left_alone(disk: Path, which: str) -> None:
    precious = disk.parent / "precious"
    precious.write_text("data")
    places = {"--socket": disk.parent / "s", "--qmp": disk.parent / "q"} | {which: precious}
    words = [str(word) for place in places.items() for word in place]
    with untouched(precious):
        one_line(nbdmirror("serve", disk, *words), which, "precious")


def test_sockets_in_a_directory_that_is_not_there(disk: Path) -> None:
    one_line(nbdmirror("serve", disk, "--socket", "/nope/s", "--qmp", disk.parent / "q"), "/nope")
    one_line(nbdmirror("serve", disk, "--socket", disk.parent / "s", "--qmp", "/nope/q"), "/nope")


def test_no_server_there(folder: Path) -> None:
    for command in ("status", "complete", "cancel", "pause", "resume", "events"):
        done = nbdmirror(command, "--qmp", folder / "nope")
        one_line(done, str(folder / "nope"), status=3)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (["state-dir="], "state-dir=: is empty"),
        (["qmp=/a", "qmp=/b"], "qmp=/b: is given twice"),
        (["accept-old-side=3f9a60c2", "accept-old-side=0123abcd"], "needs state-dir"),
        (["mirror-to=nbd://h:99999/"], "from 1 to 65535"),
        (["file=nbd+unix:///?sokcet=s"], "'sokcet' is unknown"),
        ([f"file={'n' * 201}=/x"], "the name is too long"),
    ],
)
def test_what_the_plugin_refuses(disk: Path, parameters: list[str], words: str) -> None:
    one_line(bare(disk.parent, f"file={disk}", *parameters), words)
