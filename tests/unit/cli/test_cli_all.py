"""`nbdmirror status --all`: every server of a host, also one that cannot be queried."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fakes import Fake, FakeQemu, QmpFake
from unit.cli.cliparts import Main, one_line

from nbdmirror.cli import list as cli_list
from nbdmirror.cli import web
from nbdmirror.cli.common import DONE, NO_SERVER, TIMED_OUT, USAGE, default_qmp_paths

Add = Callable[[str], Path]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the host: its sockets are all that there is."""
    monkeypatch.setattr(cli_list, "PLACES", (str(tmp_path / "*.qmp"),))
    monkeypatch.setattr(cli_list, "_processes", list)
    monkeypatch.setattr(cli_list, "default_qmp_paths", list)
    monkeypatch.delenv("NBDMIRROR_QMP", raising=False)
    return tmp_path


@pytest.fixture
def add(host: Path) -> Iterator[Add]:
    """add(kind): a server of that kind; returns its socket."""
    with contextlib.ExitStack() as stack:

        def begin(kind: str) -> Path:
            path = host / f"{kind}.qmp"
            if kind in ("dead", "silent"):
                listener = stack.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(str(path))
                if kind == "silent":
                    listener.listen()
            else:
                server: QmpFake = FakeQemu(str(path)) if kind == "qemu" else Fake(str(path))
                server.server.start()
                stack.callback(server.server.stop)
            return path

        yield begin


def test_all_servers_are_shown(add: Add, run: Main) -> None:
    paths = [add("a"), add("b")]
    status, out, err = run("status", "--all")
    assert (status, err) == (DONE, "")
    assert out == "".join(f"{path}\n  disk0  1 GiB  read-write  a.img\n" for path in paths)
    status, out, _ = run("status", "--all", "--json")
    servers = json.loads(out)
    assert [one["qmp"] for one in servers] == list(map(str, paths))
    assert [one["disks"][0]["name"] for one in servers] == ["disk0", "disk0"]
    assert status == DONE


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["dead"], NO_SERVER),
        (["qemu"], NO_SERVER),
        (["silent"], TIMED_OUT),
        (["dead", "silent", "qemu"], TIMED_OUT),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_one_that_cannot_be_queried_is_said(
    add: Add,
    run: Main,
    kinds: list[str],
    expected: int,
    as_json: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others are shown, and the exit status is not 0; that of `list` is."""
    monkeypatch.setattr(cli_list, "ANSWER_S_MAX", 2.0)
    well = add("well")
    bad = [add(kind) for kind in kinds]
    status, out, err = run("status", "--all", *(["--json"] if as_json else []))
    assert (status, err) == (expected, "")
    if as_json:
        found = {one["qmp"]: one for one in json.loads(out)}
        assert "disks" in found[str(well)]
        assert all(found[str(path)]["error"] for path in bad)
        assert found.keys() == set(map(str, [well, *bad]))
    else:
        assert f"{well}\n  disk0" in out
        lines = out.splitlines()
        for path in bad:
            assert lines[lines.index(str(path)) + 1].startswith("  "), "the reason"
    assert run("list")[0] == DONE


def test_a_host_without_servers(host: Path, run: Main) -> None:
    status, out, err = run("status", "--all")
    assert (status, out) == (NO_SERVER, "")
    assert "no server was found on this host" in one_line(err)
    assert run("list")[:2] == (DONE, "no server was found on this host\n")


def test_servers_are_queried_side_by_side(
    add: Add, run: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers that hang delay a listing once, not once for each."""
    entered: list[Path] = []
    original = cli_list._connect

    @contextlib.asynccontextmanager
    async def connect(found: cli_list.Found):  # type: ignore[no-untyped-def]
        entered.append(Path(found.socket))
        async with original(found) as session:
            assert len(entered) == 2, "the other one waits for this one"
            yield session

    add("a"), add("b")
    monkeypatch.setattr(cli_list, "_connect", connect)
    assert run("status", "--all")[0] == DONE
    assert len(entered) == 2


@pytest.mark.parametrize("other", [["--watch"], ["--qmp", "/nowhere"]])
def test_what_all_does_not_go_with(run: Main, other: list[str]) -> None:
    status, _, err = run("status", "--all", *other)
    assert (status, "not allowed with argument --" in one_line(err)) == (USAGE, True)


def test_a_server_is_shown_once_whatever_its_socket_is_called(
    add: Add, run: Main, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a link, a hard link, a relative path, and beside the process that was found."""
    path = add("a")
    hard, soft = host / "b.qmp", host / "c.qmp"
    hard.hardlink_to(path)
    soft.symlink_to(path)
    monkeypatch.chdir(host)
    for named in ("a.qmp", str(soft), str(hard), f"{host}/../{host.name}//a.qmp"):
        monkeypatch.setenv("NBDMIRROR_QMP", named)
        for found in ([], [cli_list.Found(7, str(soft))]):
            monkeypatch.setattr(cli_list, "_processes", lambda found=found: found)
            _, out, _ = run("list", "--json")
            (server,) = json.loads(out)
            assert server["qmp"] == (str(soft) if found else str(path))
    assert web.Places([str(soft), str(host), "a.qmp"]).sockets() == [str(soft)]


@pytest.mark.parametrize("variable", ["NBDMIRROR_QMP", "XDG_RUNTIME_DIR"])
def test_a_name_with_a_pattern_is_a_name(
    run: Main, host: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    folder = host / "vm[1]*"
    folder.mkdir()
    server = Fake(str(folder / "nbdmirror.qmp"))
    server.server.start()
    monkeypatch.setattr(cli_list, "default_qmp_paths", default_qmp_paths)
    name = folder if variable == "XDG_RUNTIME_DIR" else folder / "nbdmirror.qmp"
    monkeypatch.setenv(variable, str(name))
    try:
        _, out, _ = run("list", "--json")
    finally:
        server.server.stop()
    assert [one["qmp"] for one in json.loads(out)] == [str(folder / "nbdmirror.qmp")]
