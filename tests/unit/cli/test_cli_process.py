"""What the command line shows, and how it lives as a process: interrupted, on a terminal, with a
server that ends."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.fakes import URI, Fake
from unit.cli.cliparts import WAIT_S_MAX, Main, one_line

from nbdmirror.cli import common
from nbdmirror.cli import progress as cli_progress
from nbdmirror.cli import status as cli_status

# Looking


def test_status(fake: Fake, run: Main) -> None:
    assert run("status")[1] == "disk0  1 GiB  read-write  a.img\n"
    fake.add_job("j", offset=100)
    line = "  job j: running, 25.0%, 300 B left, to nbd://target/export"
    assert run("status")[1].splitlines()[1] == line
    fake.plan["stuck"] = True
    status = json.loads(run("status", "--json")[1])
    assert status == fake.do_x_nbdmirror_query_status({})


def test_how_far_the_target_is_behind() -> None:
    def said(**job: object) -> str:
        known = {name.replace("_", "-"): value for name, value in job.items()}
        disk = {"name": "d", "jobs": [{"device": "j", **known}]}
        return cli_status.text({"disks": [disk]})

    assert ", lag 0.0 s" in said(status="ready", lag_s=0, unflushed_bytes=0)
    behind = said(status="ready", lag_s=1.312, unflushed_bytes=2 << 20)
    assert ", lag 1.4 s, 2 MiB not flushed" in behind, "never too small"
    assert ", lag 1:05" in said(status="standby", lag_s=64.2)
    for status in ("running", "paused"):
        assert ", no copy yet" in said(status=status, unflushed_bytes=1)
        assert "copy" not in said(status=status), "a server that does not know"
    assert "copy" not in said(status="concluded", unflushed_bytes=0)


def test_what_was_sent_for_what_was_changed() -> None:
    def said(**job: int) -> str:
        known = {name.replace("_", "-"): value for name, value in job.items()}
        disk = {"name": "vda", "jobs": [{"device": "j", **known}]}
        return cli_status.text({"disks": [disk]})

    assert "sent" not in said() and "sent" not in said(sent_bytes=0, changed_bytes=0)
    assert "sent 3 MiB for 2 MiB changed (1.50)" in said(sent_bytes=3 << 20, changed_bytes=2 << 20)


def test_status_tolerates_what_is_missing() -> None:
    assert cli_status.text({}) == "no disks"
    assert cli_status.text({"disks": [{}]}) == "?  read-write"
    assert cli_status.text({"disks": [{"name": "d", "jobs": [{}]}]}).count("\n") == 1


def test_rates_of_a_server_that_says_none() -> None:
    now_s = 0.0
    meter = cli_progress.Meter(lambda: now_s)
    assert meter.update({"device": "j", "offset": 0, "len": 1000}).rates is None
    now_s = 2.0
    progress = meter.update({"device": "j", "offset": 400, "len": 1100, "status": "running"})
    assert progress.rates == cli_progress.Rates(200, 0, 50, 700 / 150)
    assert str(progress) == (
        "j: running, 36.4%, 700 B left, copying 200 B/s, dirtied 50 B/s, 0:05 to go"
    )
    now_s = 60.0
    paused = {"device": "j", "offset": 400, "len": 2100, "paused": True, "status": "paused"}
    assert str(meter.update(paused)) == "j: paused, 19.0%, 1.7 KiB left"
    now_s = 61.0
    again = meter.update({"device": "j", "offset": 400, "len": 2100, "status": "running"})
    assert again.rates is None, "those of before are none of now"


SAYS: dict[str, object] = {"falling-behind": False, "copy-bytes-per-s": 0, "zero-bytes-per-s": 0}
SAYS |= {"dirty-bytes-per-s": 0, "device": "j", "offset": 0, "len": 2048, "status": "running"}


@pytest.mark.parametrize(
    ("job", "text"),
    [
        ({"copy-bytes-per-s": 1024, "left-s": 2.0}, "copying 1 KiB/s, dirtied 0 B/s, 0:02 to go"),
        ({"zero-bytes-per-s": 1 << 30}, "copying 0 B/s, zeroing 1 GiB/s, dirtied 0 B/s"),
        (
            {"copy-bytes-per-s": 1024, "left-s": 2.0, "copied-bytes": 9, "written-bytes": 8},
            "copying 1 KiB/s, dirtied 0 B/s, 0:02 to go or less",
        ),
        (
            {"status": "ready", "copy-bytes-per-s": 1024, "dirty-bytes-per-s": 1000, "left-s": 9.0},
            "copying 1 KiB/s, dirtied 1000 B/s",
        ),
    ],
)
def test_rates_are_the_servers(job: dict[str, Any], text: str) -> None:
    """It has looked all the while, and tells data from holes."""
    meter = cli_progress.Meter(lambda: 0.0)
    said = str(meter.update(SAYS | job))
    assert said.endswith(f"2 KiB left, {text}")


def test_a_server_that_copies_nothing_has_no_rates() -> None:
    meter = cli_progress.Meter(lambda: 0.0)
    job = {"device": "j", "offset": 0, "len": 2048, "falling-behind": False}
    assert str(meter.update(job)) == "j: running, 0.0%, 2 KiB left"


def test_plain_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 0.0
    display = cli_progress.PlainDisplay(lambda: now_s)
    for step in range(1000):
        now_s = step * 0.001
        display.update({"device": "j", "offset": step, "len": 1000})
    assert len(capsys.readouterr().err.splitlines()) == 20
    now_s += 6
    display.update({"device": "j", "offset": 999, "len": 1000})
    assert len(capsys.readouterr().err.splitlines()) == 1


# As a process


def start(fake: Fake | None, *argv: str, **options: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "NBDMIRROR_QMP": fake.path if fake else ""}
    command = [sys.executable, "-m", "nbdmirror", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, env=env, text=True, **pipes)


def test_interrupting_a_wait_leaves_the_job(fake: Fake) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j")
    process = start(fake, "wait", "--concluded")
    assert process.stderr
    assert process.stderr.readline().startswith("j: running")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S_MAX)
    assert process.returncode == common.INTERRUPTED
    assert err == "nbdmirror: interrupted; job j: running, 0.0%, 400 B left\n"
    assert "j" in fake.jobs


def test_events_until_the_server_ends(fake: Fake) -> None:
    with_json, plain = start(fake, "events", "--json"), start(fake, "events")
    assert with_json.stdout
    assert plain.stdout
    watcher = start(fake, "status", "--watch", "--json")
    assert watcher.stdout
    assert json.loads(watcher.stdout.readline())["disks"]
    number = 0
    for stdout in (with_json.stdout, plain.stdout):  # its first line tells that it listens
        reader = threading.Thread(target=stdout.readline)
        reader.start()
        while reader.is_alive():
            fake.ring.append("BLOCK_JOB_READY", {"device": "j", "n": number})
            reader.join(0.05)
            number += 1
            assert number < 400
    fake.ring.append("SHUTDOWN", {"guest": False})
    fake.server.stop()
    out, err = with_json.communicate(timeout=WAIT_S_MAX)
    assert (with_json.returncode, err) == (common.DONE, "")
    assert json.loads(out.splitlines()[-1])["event"] == "SHUTDOWN"
    out, err = plain.communicate(timeout=WAIT_S_MAX)
    assert (plain.returncode, err) == (common.DONE, "")
    assert out.splitlines()[-1].endswith(".500000 SHUTDOWN guest=false")
    assert "lost the connection" in watcher.communicate(timeout=WAIT_S_MAX)[1]
    assert watcher.returncode == common.NO_SERVER


def test_the_server_dies_during_a_wait(fake: Fake) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j")
    process = start(fake, "wait", "--concluded")
    assert process.stderr
    assert process.stderr.readline().startswith("j: running")
    fake.server.stop()
    _, err = process.communicate(timeout=WAIT_S_MAX)
    assert process.returncode == common.NO_SERVER
    assert one_line(err) == "nbdmirror: lost the connection to the server; see: nbdmirror status\n"


@pytest.mark.parametrize("argv", [["mirror", URI, "--wait", "completed"], ["status", "--watch"]])
def test_on_a_terminal(fake: Fake, argv: list[str]) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "NBDMIRROR_QMP": fake.path, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-m", "nbdmirror", *argv], env=env, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    drawn, interrupted = b"", False
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux tells the end of a terminal
            break
        drawn += piece
        if argv[0] == "status" and b"a.img" in drawn and not interrupted:
            process.send_signal(signal.SIGINT)
            interrupted = True  # a second one would end it the hard way while it tidies up
    os.close(ours)
    assert process.wait(WAIT_S_MAX) == common.DONE, drawn
    assert b"\x1b[" in drawn
    if argv[0] == "mirror":
        assert "━".encode() in drawn
        assert b"pivot held the guest" in drawn


def imported_by(*argv: str) -> tuple[int, set[str]]:
    """The exit status of a command, and the modules that it has imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "nbdmirror", *argv],
        capture_output=True,
        text=True,
        timeout=WAIT_S_MAX,
        check=False,
    )
    return done.returncode, set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))


def test_what_help_imports() -> None:
    for argv, status in (
        (["--help"], 0),
        (["--version"], 0),
        (["wait"], 2),
        (["mirror", "--help"], 0),
        (["plugin-path"], None),
    ):
        returned, imported = imported_by(*argv)
        assert status in (returned, None)
        assert "argparse" in imported
        assert not imported & {"nbd", "nbdkit", "rich", "qemu", "qemu.qmp", "asyncio", "bitarray"}


def test_what_a_server_without_keys_imports_before_it_becomes_nbdkit(tmp_path: Path) -> None:
    returned, imported = imported_by("serve", str(tmp_path / "none"), "--socket", "guest.sock")
    assert returned == common.FAILED
    assert "nbdmirror.cli.places" in imported
    assert not imported & {"ssl", "asyncio", "logging.handlers", "nbd", "bitarray"}
