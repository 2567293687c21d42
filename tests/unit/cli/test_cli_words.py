"""Refusals are in the command line's own words, with what to do."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from support.fakes import Fake
from unit.cli.cliparts import Main, one_line

from nbdmirror import unix_sockets as sockets
from nbdmirror.cli import common
from nbdmirror.cli import list as cli_list
from nbdmirror.cli import main as cli
from nbdmirror.cli import parsers as cli_parsers
from nbdmirror.cli import words as cli_words
from nbdmirror.errors import CommandError


@pytest.mark.parametrize(
    ("refusal", "text"),
    [
        ("Job 'j' in state 'running' cannot accept command verb 'complete'", "wait --ready"),
        ("Job 'j' in state 'concluded' cannot accept command verb 'cancel'", "nbdmirror dismiss"),
        ("Job 'j' in state 'pending' cannot accept command verb 'pause'", "nbdmirror finalize"),
        ("Job 'j' in state 'waiting' cannot accept command verb 'pause'", "job j is waiting"),
        ("Job ID 'j' already in use", "nbdmirror dismiss --job j"),
        ("Node 'd' is busy: block device is in use by block job: mirror", "nbdmirror status"),
        ("The block job for device 'j' is currently paused", "cancel --force"),
        ("The active block job 'j' cannot be completed", "being cancelled"),
        ("Job is already paused", "nbdmirror resume"),
        ("Cannot find device='d' nor node-name='d'", "there is no disk d"),
        ("Dirty bitmap 'b' not found", "there is no bitmap b"),
        ("Bitmap 'b' could not be found", "there is no bitmap b"),
        ("Parameter 'granularity' expects a power of 2", "--granularity expects a power of 2"),
        (
            "Parameter 'x-nbdmirror-reconnect-delay' expects uint32_t",
            "--reconnect-delay expects uint32_t",
        ),
        ("Parameter 'x-nbdmirror-target-cluster-size' expects it", "--target-cluster-size expects"),
        ("The command job-complete has not been found", "too old"),
        ("Parameter 'x-nbdmirror-interval' expects 0.1 to 86400 seconds", "--every expects 0.1 to"),
        ("Parameter 'x-nbdmirror-keep' expects 0 to 3 seconds", "--keep expects"),
        ("Parameter 'x-nbdmirror-keep' needs copy-mode 'points'", "--keep needs --journal"),
        ("Parameter 'x-nbdmirror-rpo' needs copy-mode 'points'", "need --journal or --snapshots"),
        ("Copy mode 'points' accepts no 'x-nbdmirror-may'", "accepts no --may"),
        ("Copy mode 'points' needs sync 'full'", "--sync full"),
        ("Parameter 'name': '17' is a number", "--name: '17' is a number"),
        ("Journal: Failed to connect to 'nbd://x'", "--journal: Failed to connect to 'nbd://x'"),
        ("Job 'speed' is ending: it cannot", "Job 'speed' is ending"),
    ],
)
def test_refusals(refusal: str, text: str) -> None:
    said = cli_words.refusal(refusal)
    assert text in said
    assert "verb" not in said and "node" not in said.lower() and "x-nbdmirror" not in said


def test_every_argument_that_the_command_line_sends_has_a_name_that_users_type() -> None:
    """Else they read of a parameter that they have never heard of."""
    sent = {
        name.replace("_", "-")
        for path in Path(cli_words.__file__).parent.glob("*.py")
        for name in re.findall(r"\bx_nbdmirror_\w+", path.read_text())
    }
    assert sent == {name for name in cli_words._OPTIONS if name.startswith("x-")}


def test_a_refusal_that_is_not_known_is_told_as_it_is(fake: Fake, run: Main) -> None:
    """Without the name of the QMP command, which nobody typed."""
    fake.plan["stuck"] = True
    fake.add_job("j")

    def refuse(arguments: dict[str, Any]) -> Any:
        raise CommandError("the moon is full")

    fake.do_job_pause = refuse  # type: ignore[method-assign]
    assert run("pause")[2] == "nbdmirror: the moon is full\n"


def test_a_socket_of_another_user(run: Main, tmp_path: Path, monkeypatch: Any) -> None:
    """Root may do all, so the system's answer is made up."""
    from qemu.qmp import QMPClient

    async def connect(self: Any, path: str) -> None:
        from qemu.qmp import ConnectError

        raise ConnectError("failed", PermissionError(13, "Permission denied"))

    monkeypatch.setattr(QMPClient, "connect", connect)
    status, _, err = run("status", "--qmp", str(tmp_path / "s"))
    assert status == common.NO_SERVER
    assert "belongs to another user" in one_line(err)
    assert "start one" not in err


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(run: Main, option: str) -> None:
    from nbdmirror import __version__

    assert run(option)[:2] == (common.DONE, f"nbdmirror {__version__}\n")


def test_each_option_has_its_help() -> None:
    import argparse

    def check(parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    check(command)
            else:
                assert action.help, f"{parser.prog}: {action.option_strings or action.dest}"

    check(cli.build_parser())


# Bitmaps


def test_bitmaps(fake: Fake, run: Main, monkeypatch: Any) -> None:
    bitmaps: dict[str, dict[str, Any]] = {}
    status = fake.do_x_nbdmirror_query_status

    def query(arguments: dict[str, Any]) -> Any:
        found = status(arguments)
        found["disks"][0]["bitmaps"] = list(bitmaps.values())
        return found

    def add(arguments: dict[str, Any]) -> Any:
        name, granularity = arguments["name"], arguments.get("granularity", 65536)
        bitmaps[name] = {"name": name, "count": 131072, "granularity": granularity}
        bitmaps[name]["recording"] = not arguments.get("disabled")
        return {}

    def remove(arguments: dict[str, Any]) -> Any:
        del bitmaps[arguments["name"]]
        return {}

    fake.do_x_nbdmirror_query_status = query  # type: ignore[method-assign]
    fake.do_block_dirty_bitmap_add = add  # type: ignore[attr-defined]
    fake.do_block_dirty_bitmap_remove = remove  # type: ignore[attr-defined]
    fake.do_block_dirty_bitmap_merge = lambda arguments: {}  # type: ignore[attr-defined]
    assert run("bitmap", "list")[1] == "disk0  no bitmaps\n"
    said = "a: 128 KiB dirty, granularity 4 KiB, disabled\n"
    options = ["--granularity", "4K", "--disabled"]
    assert run("bitmap", "add", "a", *options)[:2] == (common.DONE, said)
    assert run("bitmap", "list")[1] == f"disk0\n  {said}"
    assert '"name": "a"' in run("bitmap", "list", "--json")[1]
    assert run("bitmap", "merge", "a", "b", "c")[0] == common.DONE
    merge = {"node": "disk0", "target": "a", "bitmaps": ["b", "c"]}
    assert ("block-dirty-bitmap-merge", merge) in fake.calls
    assert run("bitmap", "remove", "a")[1] == "disk disk0 has no bitmap a any more\n"
    assert "no disk x" in one_line(run("bitmap", "list", "--device", "x")[2])


@pytest.mark.parametrize(
    "words",
    [
        ["list", "a"],
        ["add"],
        ["add", "a", "b"],
        ["merge", "a"],
        ["remove", "a", "--persistent"],
        ["clear", "a", "--granularity", "4K"],
        ["enable", "a", "--json"],
        ["shred", "a"],
        [],
    ],
)
def test_what_is_no_command_of_bitmaps(fake: Fake, run: Main, words: list[str]) -> None:
    status, out, err = run("bitmap", *words)
    assert (status, out) == (common.USAGE, "")
    one_line(err)
    assert not fake.calls


def test_every_bitmap_action_is_a_qmp_command() -> None:
    from nbdmirror.qmp.commands import COMMANDS

    for action in set(cli_parsers.BITMAP_ACTIONS) - {"list"}:
        assert f"block-dirty-bitmap-{action}" in COMMANDS


# Which servers there are


def test_list(fake: Fake, run: Main, tmp_path: Path, monkeypatch: Any) -> None:
    """One that answers, one that has no control socket, one whose socket is gone, and a socket
    without a process."""
    stale = tmp_path / "stale.qmp"
    sockets.bind_unix_socket(str(stale)).close()
    monkeypatch.setattr(cli_list, "PLACES", (str(tmp_path / "*.qmp"),))
    monkeypatch.setattr(common, "default_qmp_paths", list)
    monkeypatch.setattr(cli_list, "default_qmp_paths", list)
    processes = [
        cli_list.Found(11, fake.path),
        cli_list.Found(12, ""),
        cli_list.Found(13, str(tmp_path / "gone")),
    ]
    monkeypatch.setattr(cli_list, "_processes", lambda: processes)
    status, out, _ = run("list")
    assert status == common.DONE
    lines = out.splitlines()
    assert lines[:2] == [f"{fake.path}  process 11", "  disk0  1 GiB  read-write  a.img"]
    assert lines[2:4] == ["no control socket  process 12", "  the server has no control socket"]
    assert lines[4] == f"{tmp_path / 'gone'}  process 13"
    assert "has just ended" in lines[5]
    assert lines[6] == str(stale)
    assert "Connection refused" in lines[7]
    assert '"pid": 11' in run("list", "--json")[1]


def test_list_of_nothing(run: Main, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(cli_list, "find", list)
    assert run("list")[:2] == (common.DONE, "no server was found on this host\n")


def test_processes_are_known_by_the_plugin(monkeypatch: Any) -> None:
    here = os.getpid()
    words = ["nbdkit", "python", "/p/nbdmirror-plugin.py", "file=d", "qmp=/r/q"]
    assert cli_list._socket(words, here) == "/r/q"
    assert cli_list._socket(["nbdkit", "qmp=q"], here) == f"{os.getcwd()}/q"
    assert cli_list._socket(["nbdkit"], here) == ""


@pytest.mark.parametrize(("status", "flag"), [("pending", "finalize"), ("concluded", "dismiss")])
def test_what_the_server_does_itself_is_asked_of_nobody(status: str, flag: str) -> None:
    """A state that such a job passes through; writing its end down can take a moment."""
    job = {"status": status, "ready": True, "ending": "complete", "ending-for-s": 1}
    assert not cli_words.remarks({**job, f"auto-{flag}": True})
    (remark,) = cli_words.remarks({**job, f"auto-{flag}": False})
    assert f"nbdmirror {flag}" in remark.text


@pytest.mark.parametrize(
    ("option", "value", "seconds"),
    [
        ("--deadline", "0.5", 0.5),
        ("--deadline", "500ms", 0.5),
        ("--deadline", "2h", 7200.0),
        ("--deadline", "366d", 366 * 86400.0),
        ("--may", " write-blocking, throttle ", "throttle,write-blocking"),
        ("--may", "nothing", "nothing"),
    ],
)
def test_times_and_lists(option: str, value: str, seconds: float | str) -> None:
    args = cli.build_parser().parse_args(["change", option, value])
    assert getattr(args, option[2:]) == seconds


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--deadline", "367d", "'367d' is more than 366 days"),
        *(("--deadline", value, "is not a time") for value in ("nan", "inf", "1e3", "1h30m")),
        ("--may", "all", "'all' is none of: nothing; throttle;"),
        ("--may", "nothing,throttle", "'nothing,throttle' is none of"),
        ("--may", ",", "',' is none of"),
    ],
)
def test_what_is_none(run: Main, option: str, value: str, text: str) -> None:
    status, _, err = run("change", option, value)
    assert status == common.USAGE and text in one_line(err)


def test_options_of_a_change_have_no_defaults(run: Main) -> None:
    """What is not given stays as it is."""
    _, out, _ = run("change", "--help")
    assert " ".join(out.split()).count("default: as it is") == 4
