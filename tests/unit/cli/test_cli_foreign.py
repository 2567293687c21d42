"""The control socket is not an nbdmirror's: a QEMU's, its storage daemon's, or no socket at all."""

from __future__ import annotations

import os
import select
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fakes import URI, Fake, FakeQemu
from support.paritysides import StorageDaemon
from unit.cli.cliparts import Main, one_line

from nbdmirror.cli import common
from nbdmirror.cli import control as cli_control
from nbdmirror.cli import list as cli_list

COMMANDS = {
    "mirror": ["mirror", URI],
    "status": ["status"],
    "explain": ["explain"],
    "wait": ["wait", "--ready"],
    "complete": ["complete"],
    "cancel": ["cancel"],
    "pause": ["pause"],
    "resume": ["resume"],
    "set-speed": ["set-speed", "1M"],
    "copy-mode": ["copy-mode", "background"],
    "change": ["change", "--max-pause", "100"],
    "finalize": ["finalize"],
    "dismiss": ["dismiss"],
    "point": ["point"],
    "bitmap": ["bitmap", "list"],
    "events": ["events"],
}


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[FakeQemu]:
    qemu = FakeQemu(str(tmp_path / "monitor"))
    qemu.server.start()
    yield qemu
    qemu.server.stop()


def test_all_commands_are_tried() -> None:
    assert set(COMMANDS) == set(cli_control._COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_to_a_qemu_is_refused(qemu: FakeQemu, run: Main, command: str) -> None:
    """Nothing is asked of it, and nothing is done to it."""
    status, out, err = run(*COMMANDS[command], "--qmp", qemu.path)
    assert (status, out) == (common.NO_SERVER, "")
    text = f"{qemu.path} is the control socket of QEMU 7.2.0, not of nbdmirror"
    assert text in one_line(err)
    assert qemu.calls == []


def closing(listener: socket.socket, *, resets: bool) -> None:
    """Close a connection before anything was said; `resets`: before it was accepted."""
    assert select.select([listener], [], [], 20)[0]
    if not resets:
        listener.accept()[0].close()
    listener.close()


@pytest.mark.parametrize("resets", [False, True], ids=["closed", "reset"])
def test_a_server_that_closes_the_connection_is_not_missing(
    tmp_path: Path, run: Main, resets: bool
) -> None:
    """It ends at this moment, or has no descriptor left. That is not a server that nobody has
    started."""
    path = str(tmp_path / "control")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=closing, args=(listener,), kwargs={"resets": resets})
        thread.start()
        status, out, err = run("status", "--qmp", path)
        thread.join()
    assert (status, out) == (common.NO_SERVER, "")
    assert f"the server at {path} closed the connection" in one_line(err)
    assert "start one" not in err


def test_a_list_names_a_qemu(qemu: FakeQemu, run: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDMIRROR_QMP", qemu.path)
    status, out, _ = run("list")
    assert (status, "is the control socket of QEMU 7.2.0" in out) == (common.DONE, True)


@pytest.mark.parametrize("answer", [{"disks": 5}, {"disks": [{"jobs": [{"len": "x"}]}]}])
def test_a_server_that_is_not_understood_hides_no_other_one(
    tmp_path: Path, run: Main, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]
) -> None:
    odd, other = (Fake(str(tmp_path / name)) for name in ("odd", "other"))
    monkeypatch.setattr(odd, "do_x_nbdmirror_query_status", lambda _: answer)
    monkeypatch.setenv("NBDMIRROR_QMP", odd.path)
    monkeypatch.setattr(cli_list, "PLACES", (other.path,))
    for fake in (odd, other):
        fake.server.start()
    try:
        status, out, err = run("list")
    finally:
        for fake in (odd, other):
            fake.server.stop()
    assert (status, err) == (common.DONE, "")
    assert f"{odd.path}\n  the server's answer cannot be understood: " in out
    assert f"{other.path}\n  disk0" in out


def test_a_real_storage_daemon(folder: Path, run: Main) -> None:
    with StorageDaemon(folder, "driver=null-co,size=4096") as daemon:
        status, out, err = run("status", "--qmp", str(daemon.qmp_path))
    assert (status, out) == (common.NO_SERVER, "")
    assert "is the control socket of QEMU " in one_line(err)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (stat.S_IFDIR, "that is a directory, not a socket"),
        (stat.S_IFREG, "that is a file, not a socket"),
        (stat.S_IFIFO, "that is a pipe, not a socket"),
        (stat.S_IFCHR, "that is a device, not a socket"),
        (stat.S_IFSOCK, "Connection refused"),
        (0, "No such file or directory"),
    ],
)
def test_what_is_at_the_path_is_said(run: Main, tmp_path: Path, kind: int, text: str) -> None:
    path = tmp_path / "path"
    if kind == stat.S_IFDIR:
        path.mkdir()
    elif kind == stat.S_IFCHR:
        path.symlink_to("/dev/null")
    elif kind:
        os.mknod(path, kind | 0o600)
    status, _, err = run("status", "--qmp", str(path))
    assert status == common.NO_SERVER
    assert f"at {path} ({text})" in one_line(err)


def test_a_path_that_no_socket_can_have(run: Main, tmp_path: Path) -> None:
    status, _, err = run("status", "--qmp", str(tmp_path / ("long" * 40)))
    assert (status, "path too long" in one_line(err)) == (common.NO_SERVER, True)


def test_a_server_with_too_many_clients(
    qemu: FakeQemu, run: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one, so nobody is told to start one."""
    monkeypatch.setattr("nbdmirror.qmp.server.CLIENTS_MAX", 0)
    status, _, err = run("status", "--qmp", qemu.path)
    assert status == common.NO_SERVER
    assert "too many clients are connected" in one_line(err)
    assert "start one" not in err
