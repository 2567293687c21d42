"""Output that is closed, full, or read by nobody: no traceback, and the exit status says what
became of the job, not of the output."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fakes import URI, Fake
from unit.cli.cliparts import WAIT_S_MAX, Main, one_line

from nbdmirror.cli import common as cli_common
from nbdmirror.cli import main as cli


@pytest.fixture(params=["buffered", "PYTHONUNBUFFERED"])
def unbuffered(request: pytest.FixtureRequest) -> str:
    return "1" if request.param == "PYTHONUNBUFFERED" else ""


@pytest.fixture(params=["full", "unread"])
def output(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor that takes nothing."""
    if request.param == "full":
        fd = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, fd = os.pipe()
        os.close(reader)
    yield fd
    os.close(fd)


def finished(fake: Fake, unbuffered: str, *argv: str, **streams: int) -> tuple[int, str]:
    """The exit status, and what was said on stderr."""
    env = {**os.environ, "NBDMIRROR_QMP": fake.path, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-m", "nbdmirror", *argv],
        env=env,
        text=True,
        timeout=WAIT_S_MAX,
        check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},  # type: ignore[call-overload]
    )
    assert "Traceback" not in (done.stderr or "")
    assert "Exception ignored" not in (done.stderr or "")
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize(
    "argv",
    [["status"], ["status", "--json"], ["list"], ["plugin-path"], ["--version"], ["--help"]],
    ids=" ".join,
)
def test_an_answer_that_cannot_be_written(
    fake: Fake, unbuffered: str, output: int, argv: list[str]
) -> None:
    status, said = finished(fake, unbuffered, *argv, stdout=output)
    assert status == cli_common.FAILED
    if said:
        assert "standard output: No space left" in one_line(said)


def test_an_answer_that_is_longer_than_a_buffer(
    fake: Fake, unbuffered: str, output: int, tmp_path: Path
) -> None:
    for number in range(200):
        (tmp_path / f"{'long' * 20}-{number}.qmp").touch()
    fake.path = str(tmp_path / "*.qmp")
    status, said = finished(fake, unbuffered, "list", stdout=output)
    assert status == cli_common.FAILED
    if said:
        assert "standard output: No space left" in one_line(said)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_became_of_the_job_counts(
    fake: Fake, unbuffered: str, output: int, stream: str
) -> None:
    argv = ["mirror", URI, "--wait", "completed"]
    status, _ = finished(fake, unbuffered, *argv, **{stream: output})
    assert status == cli_common.DONE
    assert fake.source == URI, "the disk was moved"


def test_a_refusal_that_nobody_hears(fake: Fake, output: int) -> None:
    assert finished(fake, "", "complete", stderr=output)[0] == cli_common.FAILED
    assert finished(fake, "", "compleat", stderr=output)[0] == cli_common.USAGE


def test_an_interrupt_before_anything_was_done(run: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_parser", interrupted)
    status, _, err = run("status")
    assert status == cli_common.INTERRUPTED
    assert "interrupted" in one_line(err)


def test_a_directory_that_is_gone(
    run: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a relative path would be."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    status, _, err = run("serve", "disk.img", "--socket", "s", "--qmp", str(tmp_path / "q"))
    assert status == cli_common.FAILED
    assert "the current directory does not exist any more" in one_line(err)
