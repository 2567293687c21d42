"""The command line, against a server with made-up jobs, and what `serve` makes of its options."""

from __future__ import annotations

import json
import os
import pty
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import URI, Fake

from nbdmirror import (
    cli,
    cli_control,
    cli_jobs,
    cli_progress,
    cli_serve,
    cli_session,
    cli_status,
    sockets,
)

WAIT_S_MAX = 20.0
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(cli_jobs, "POLL_S", 0.01)
    monkeypatch.setattr(cli_control, "WATCH_S", 0.01)
    fake = Fake(str(tmp_path / "qmp"))
    monkeypatch.setenv("NBDMIRROR_QMP", fake.path)
    fake.server.start()
    yield fake
    fake.server.stop()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Main:
    def run(*argv: str) -> tuple[int, str, str]:
        try:
            status = cli.main(list(argv))
        except SystemExit as left:
            status = int(left.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


def one_line(err: str) -> str:
    assert err.startswith("nbdmirror: ")
    assert err.count("\n") == 1
    return err


# Usage, and nobody there


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["no-such"],
        ["wait"],
        ["wait", "--ready", "--concluded"],
        ["wait", "--ready", "--timeout", "x"],
        ["mirror"],
        ["mirror", URI, "--sync", "x"],
        ["mirror", URI, "--granularity", "64Q"],
        ["set-speed"],
        ["complete", "--job", "a", "--device", "b"],
        ["serve"],
        ["serve", "a", "--socket", "s", "--port", "1"],
        ["serve", "a", "--port", "70000"],
        ["serve", "x="],
    ],
)
def test_usage_errors(run: Main, argv: list[str]) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (cli.USAGE, "")
    one_line(err)


def test_nobody_there(run: Main, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "no" / "dir", tmp_path):
        status, _, err = run("status", "--qmp", str(path))
        assert status == cli.NO_SERVER
        assert str(path) in one_line(err)
        assert "--qmp" in err


def test_a_server_that_is_not_qmp(run: Main, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(cli_session, "CONNECT_S_MAX", 0.2)
    with sockets.bind_unix_socket(str(tmp_path / "s")):
        status, _, err = run("status", "--qmp", str(tmp_path / "s"))
        assert (status, "does not answer" in one_line(err)) == (cli.NO_SERVER, True)


def test_default_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/x")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cli.default_qmp_paths() == ["/x/nbdmirror.qmp", "/run/nbdmirror.qmp"]
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert cli.default_qmp_paths() == ["/run/nbdmirror.qmp"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(cli.CliError, match="--qmp"):
        cli.default_qmp_paths()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("64k", 65536),
        ("1.5G", 3 << 29),
        ("2TiB", 2 << 40),
        ("1MB", 1 << 20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert cli.parse_size(text) == size


def test_a_size_that_no_server_takes(run: Main) -> None:
    status, _, err = run("set-speed", "8388608T")
    assert (status, "8 EiB" in one_line(err)) == (cli.USAGE, True)
    assert cli.parse_size("8388607T") < 2**63


# Mirroring


def test_mirror_sends_what_was_asked_for(fake: Fake, run: Main) -> None:
    assert run("mirror", URI)[0] == cli.DONE
    assert fake.calls[-2] == (
        "drive-mirror",
        {"device": "disk0", "target": URI, "mode": "existing", "sync": "full"},
    )
    options = "--device d --sync top --copy-mode write-blocking --granularity 64K --buf-size 1M"
    options += " --speed 0 --on-source-error stop --on-target-error enospc --bitmap b --job j"
    options += " --target-cluster-size 2M --no-unmap --target-is-zero --allow-larger-target"
    assert run("mirror", URI, *options.split())[0] == cli.DONE
    assert fake.calls[-2][1] == {
        "device": "d",
        "target": URI,
        "mode": "existing",
        "sync": "top",
        "job-id": "j",
        "copy-mode": "write-blocking",
        "granularity": 65536,
        "buf-size": 1 << 20,
        "speed": 0,
        "on-source-error": "stop",
        "on-target-error": "enospc",
        "bitmap": "b",
        "unmap": False,
        "target-is-zero": True,
        "x-nbdmirror-target-cluster-size": 2 << 20,
        "x-nbdmirror-allow-larger-target": True,
    }


@pytest.mark.parametrize("disks", [[], ["a", "b"]])
def test_mirror_wants_one_disk(fake: Fake, run: Main, disks: list[str]) -> None:
    fake.disks = disks
    status, _, err = run("mirror", URI)
    assert status == cli.FAILED
    assert ("a, b" if disks else "no disks") in one_line(err)


def test_mirror_and_wait(fake: Fake, run: Main) -> None:
    status, out, err = run("mirror", URI, "--wait", "ready")
    assert (status, out) == (cli.DONE, "job disk0 is ready: source and target are in sync\n")
    assert re.search(r"^disk0: running, 25\.0%, 300 B left", err, re.MULTILINE)
    assert fake.jobs["disk0"]["ready"]


def test_mirror_and_complete(fake: Fake, run: Main) -> None:
    status, out, _ = run("mirror", URI, "--wait", "completed")
    assert status == cli.DONE
    assert out == "job disk0 completed; the pivot held the guest for 3.2 ms\n"
    assert not fake.jobs


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"fail": True}, "failed: No space left on device"),
        ({"refuse": True}, "smaller than the source"),
        ({"vanish": True}, "gone"),
    ],
)
def test_mirror_fails(fake: Fake, run: Main, plan: dict[str, Any], text: str) -> None:
    fake.plan = plan
    status, out, err = run("mirror", URI, "--wait", "completed")
    assert (status, out) == (cli.FAILED, "")
    assert text in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("nbdmirror: ")


@pytest.mark.parametrize("options", [[], ["--wait", "ready"]])
def test_mirror_to_a_target_of_another_size(fake: Fake, run: Main, options: list[str]) -> None:
    """Told with both sizes, and even if nobody asked to wait: the job fails at once."""

    def fails(arguments: dict[str, Any]) -> Any:
        fake.add_job("disk0")
        sizes = {"size": 1000, "target-size": 2000}
        fake.ring.append("X_NBDMIRROR_SIZES_DIFFER", {"device": "disk0", "id": "disk0", **sizes})
        fake.end("disk0", "BLOCK_JOB_COMPLETED", error="Source and target image differ")
        return {}

    fake.do_drive_mirror = fails  # type: ignore[method-assign]
    status, out, err = run("mirror", URI, *options)
    assert (status, out) == (cli.FAILED, "")
    for part in ("1000 bytes", "target 2000", "--allow-larger-target"):
        assert part in one_line(err)


def test_mirror_is_cancelled_by_somebody_else(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j")

    def cancel() -> None:
        assert fake.queried.wait(WAIT_S_MAX)
        fake.end("j", "BLOCK_JOB_CANCELLED")

    thread = threading.Thread(target=cancel)
    thread.start()
    status, _, err = run("wait", "--concluded")
    thread.join(WAIT_S_MAX)
    assert status == cli.FAILED
    # The end may be seen by `wait` before it begins to watch; then there is no job to wait for.
    assert "cancelled" in err or "no job" in err or "not seen" in err


# Verbs on jobs


def test_wait_ready_and_concluded(fake: Fake, run: Main) -> None:
    fake.add_job("j")
    assert run("wait", "--ready")[:2] == (
        cli.DONE,
        "job j is ready: source and target are in sync\n",
    )
    fake.jobs["j"]["status"] = "completing"
    status, out, _ = run("wait", "--concluded", "--job", "j")
    assert (status, out[:15]) == (cli.DONE, "job j completed")


def test_wait_for_a_concluded_job_that_is_kept(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j", status="concluded", error="Input/output error")
    status, _, err = run("wait", "--concluded")
    assert (status, "Input/output error" in err) == (cli.FAILED, True)


@pytest.mark.parametrize("until", ["--ready", "--concluded"])
@pytest.mark.parametrize("which", [[], ["--job", "j"], ["--device", "disk0"]])
@pytest.mark.parametrize("error", [None, "No space left on device"])
def test_wait_for_a_job_that_ends_as_it_begins(
    fake: Fake, run: Main, until: str, which: list[str], error: str | None
) -> None:
    """The job is gone at the first look, and its end was heard: success and failure differ."""

    def answer(arguments: dict[str, Any]) -> Any:
        if "j" in fake.jobs:
            pivot = {"device": "disk0", "id": "j", "pause-ms": 3.25}
            fake.ring.append("X_NBDMIRROR_PIVOTED", pivot)
            fake.end("j", "BLOCK_JOB_COMPLETED", **({"error": error} if error else {}))
        return []

    fake.add_job("j")
    fake.do_query_block_jobs = answer  # type: ignore[method-assign]
    status, out, err = run("wait", until, *which)
    if error:
        assert (status, out) == (cli.FAILED, "")
        assert error in one_line(err)
    else:
        assert (status, out[:15], err) == (cli.DONE, "job j completed", "")


@pytest.mark.parametrize("which", [[], ["--job", "j"], ["--device", "disk0"]])
def test_wait_for_a_job_of_which_nothing_is_known(fake: Fake, run: Main, which: list[str]) -> None:
    status, out, err = run("wait", "--concluded", *which)
    assert (status, out) == (cli.FAILED, "")
    assert "how is not known" in one_line(err)


def test_time_runs_out(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j")
    status, _, err = run("wait", "--ready", "--timeout", "0.1")
    assert status == cli.TIMED_OUT
    assert err.splitlines()[-1] == ("nbdmirror: time ran out after 0.1 s; jobs on the server go on")


def test_complete(fake: Fake, run: Main) -> None:
    fake.add_job("j", offset=400, ready=True, status="ready")
    status, out, _ = run("complete", "--timeout", "20")
    assert (status, out) == (cli.DONE, "job j completed; the pivot held the guest for 3.2 ms\n")


def test_complete_of_a_paused_job_says_what_it_waits_for(fake: Fake, run: Main) -> None:
    """It is remembered, and waited for; here until somebody has resumed it."""
    fake.plan["stuck"] = True
    fake.add_job("j", offset=400, ready=True, status="standby", paused=True)

    def complete(arguments: dict[str, Any]) -> Any:
        return {}

    fake.do_block_job_complete = complete  # type: ignore[method-assign]
    status, out, err = run("complete", "--timeout", "0.2")
    assert (status, out) == (cli.TIMED_OUT, "")
    assert err.count("it will complete after: nbdmirror resume\n") == 1


def test_complete_before_ready_is_refused_with_advice(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j")
    status, _, err = run("complete")
    assert (status, "wait --ready" in one_line(err)) == (cli.FAILED, True)


@pytest.mark.parametrize(
    ("ready", "options", "text"),
    [
        (True, [], "consistent copy"),
        (True, ["--force"], "may not be consistent"),
        (False, [], "may not be consistent"),
    ],
)
def test_cancel(fake: Fake, run: Main, ready: bool, options: list[str], text: str) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j", ready=ready)
    status, out, _ = run("cancel", *options)
    assert (status, text in out) == (cli.DONE, True)


def test_choosing_a_job(fake: Fake, run: Main) -> None:
    fake.plan["stuck"] = True
    assert "no job" in one_line(run("pause")[2])
    fake.add_job("j")
    assert run("pause")[:2] == (cli.DONE, "job j is paused; go on with: nbdmirror resume\n")
    assert run("resume", "--job", "j")[0] == cli.DONE
    assert run("set-speed", "10M", "--device", "disk0")[0] == cli.DONE
    assert fake.calls[-1] == ("block-job-set-speed", {"device": "j", "speed": 10 << 20})
    fake.add_job("k")
    status, _, err = run("resume")
    assert (status, "several jobs (j, k)" in one_line(err)) == (cli.FAILED, True)
    assert "no job x" in one_line(run("resume", "--job", "x")[2])
    assert "disk x has no job" in one_line(run("resume", "--device", "x")[2])


# Looking


def test_status(fake: Fake, run: Main) -> None:
    assert run("status")[1] == "disk0  1 GiB  read-write  a.img\n"
    fake.add_job("j", offset=100)
    line = "  job j: running, 25.0%, 300 B left, to nbd://target/export"
    assert run("status")[1].splitlines()[1] == line
    status = json.loads(run("status", "--json")[1])
    assert status == fake.do_x_nbdmirror_query_status({})
    fake.extension = False
    assert run("status")[1].startswith("disk0  1 GiB  read-write  /d")


def test_status_tolerates_what_is_missing() -> None:
    assert cli_status.text({}) == "no disks"
    assert cli_status.text({"disks": [{}]}) == "?  read-write"
    assert cli_status.text({"disks": [{"name": "d", "jobs": [{}]}]}).count("\n") == 1
    assert cli_status.from_query_block([{"inserted": {"node-name": "n"}}])[0]["name"] == "n"


def test_rates() -> None:
    now_s = 0.0
    meter = cli_progress.Meter(lambda: now_s)
    first = meter.update({"device": "j", "offset": 0, "len": 1000})
    assert first.copied_bytes_per_s is None
    now_s = 2.0
    progress = meter.update({"device": "j", "offset": 400, "len": 1100, "status": "running"})
    assert (progress.copied_bytes_per_s, progress.dirtied_bytes_per_s) == (200, 50)
    assert progress.left_s == 700 / 150
    assert str(progress) == (
        "j: running, 36.4%, 700 B left, copying 200 B/s, dirtied 50 B/s, 0:05 to go"
    )
    now_s = 60.0
    stalled = meter.update({"device": "j", "offset": 400, "len": 2100, "paused": True})
    assert "paused" in str(stalled)
    assert "not co" in str(stalled)


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
    assert process.returncode == cli.INTERRUPTED
    assert err == "nbdmirror: interrupted; jobs on the server go on\n"
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
    assert (with_json.returncode, err) == (cli.DONE, "")
    assert json.loads(out.splitlines()[-1])["event"] == "SHUTDOWN"
    out, err = plain.communicate(timeout=WAIT_S_MAX)
    assert (plain.returncode, err) == (cli.DONE, "")
    assert out.splitlines()[-1].endswith(".500000 SHUTDOWN guest=false")
    assert "went away" in watcher.communicate(timeout=WAIT_S_MAX)[1]
    assert watcher.returncode == cli.NO_SERVER


def test_the_server_dies_during_a_wait(fake: Fake) -> None:
    fake.plan["stuck"] = True
    fake.add_job("j")
    process = start(fake, "wait", "--concluded")
    assert process.stderr
    assert process.stderr.readline().startswith("j: running")
    fake.server.stop()
    _, err = process.communicate(timeout=WAIT_S_MAX)
    assert process.returncode == cli.NO_SERVER
    assert one_line(err) == "nbdmirror: the server went away; see: nbdmirror status\n"


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
    assert process.wait(WAIT_S_MAX) == cli.DONE, drawn
    assert b"\x1b[" in drawn
    if argv[0] == "mirror":
        assert "━".encode() in drawn
        assert b"pivot held the guest" in drawn


def test_what_help_imports() -> None:
    for argv, status in (
        (["--help"], 0),
        (["wait"], 2),
        (["mirror", "--help"], 0),
        (["plugin-path"], None),
    ):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "nbdmirror", *argv],
            capture_output=True,
            text=True,
            timeout=WAIT_S_MAX,
            check=False,
        )
        assert status in (done.returncode, None)
        imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
        assert "argparse" in imported
        assert not imported & {"nbd", "nbdkit", "rich", "qemu", "qemu.qmp", "asyncio", "bitarray"}


# serve


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
    assert parts[0] == str(Path(cli.__file__).parent.parent)
    assert parts[-1] == "/mine"
    assert len(parts) == len(set(parts))
    options = (
        "vm=/d/a b=nbd+unix:///x?socket=s ./c=d.img nbd://h/e=f --socket s --qmp q --threads 4"
    )
    options += " --tls-psk k --read-only --cache none --mirror-to nbd://t --daemonize --pidfile p"
    argv, _ = command(*options.split(), extra=("--filter", "delay", "rdelay=1", "-v"))
    assert argv == [
        *["nbdkit", "-U", f"{here}/s", "--tls=require", f"--tls-psk={here}/k", "-t", "4"],
        *["-P", f"{here}/p", "-r", "--filter", "delay", "-v", "python", plugin, "file=vm=/d/a"],
        *["file=b=nbd+unix:///x?socket=s", f"file={here}/c=d.img", "file=nbd://h/e=f"],
        *[f"qmp={here}/q", "cache=none", "mirror-to=nbd://t", "read-only=true", "rdelay=1"],
    ]


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
    with pytest.raises(cli.CliError, match="only root can become somebody else"):
        command("a.img", "--user", "nobody")


def test_names_are_unique(plugin: str) -> None:
    with pytest.raises(cli.CliError, match="disk1 is taken"):
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
    assert (status, "Exec format error" in one_line(err)) == (cli.FAILED, True)
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
        assert (status, out) == (cli.FAILED, "")
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


def test_the_real_nbdkit_has_our_python() -> None:
    if not shutil.which("nbdkit"):
        pytest.skip("nbdkit is not installed")
    cli_serve._check_nbdkit(os.environ)


def test_plugin_path(run: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "nbdmirror"
    monkeypatch.setattr(cli_serve, "__file__", str(package / "cli_serve.py"))
    status, _, err = run("plugin-path")
    assert (status, "install nbdmirror again" in one_line(err)) == (cli.FAILED, True)
    for folder in (package / "_plugin", tmp_path / "plugin"):
        folder.mkdir(parents=True)
        (folder / "nbdmirror-plugin.py").touch()
        assert run("plugin-path")[:2] == (cli.DONE, f"{folder}/nbdmirror-plugin.py\n")
