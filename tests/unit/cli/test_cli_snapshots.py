"""`nbdmirror points --exec` with a made-up server: each point gets one command and one answer,
though answers are lost and other clients interfere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPError
from support.fakes import Fake
from unit.cli.cliparts import Main, one_line, reached

from nbdmirror.cli import jobs as cli_jobs
from nbdmirror.cli import snapshots as cli_snapshots
from nbdmirror.cli.session import Session
from nbdmirror.errors import CommandError

TIME = "20231114T221320.250Z"


class FakeWithPoints(Fake):
    """A job that makes `count` points, each after the acknowledgement of the one before, and
    ends."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.count = 2
        self.answers: list[Any] = []
        """To acknowledgements, the first ones: what is returned, or raised."""
        self.acks: list[dict[str, Any]] = []
        self.plan["stuck"] = True
        self.add_job("j")
        self.points = self.jobs["j"]["x-nbdmirror-points"] = {"interval-s": 1, "auto-point": False}
        self.wait_for(1)

    def wait_for(self, number: int) -> None:
        point = {"sequence": number, "time-s": 1_700_000_000.25, "bytes": 4096, "since-s": 0}
        self.points["awaited"] = point

    def do_x_nbdmirror_point_ack(self, arguments: dict[str, Any]) -> Any:
        self.acks.append(arguments)
        answer = self.answers.pop(0) if self.answers else {"repeated": False}
        number = arguments["sequence"]
        if number == self.points.get("awaited", {}).get("sequence"):
            del self.points["awaited"]
            if number < self.count:
                self.wait_for(number + 1)
            else:
                self.end("j", "BLOCK_JOB_COMPLETED")
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWithPoints]:
    monkeypatch.setattr(cli_jobs, "POLL_S", 0.01)
    monkeypatch.setattr(cli_snapshots, "RETRY_S", 0.01)
    with reached(FakeWithPoints(str(tmp_path / "qmp")), monkeypatch) as fake:
        yield fake


def test_one_command_and_one_answer_for_each_point(
    server: FakeWithPoints, run: Main, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    names = ("SEQUENCE", "TIME", "NAME", "ID", "DEVICE", "BYTES")
    told = " ".join(f"$NBDMIRROR_{name}," for name in names)
    status, out, err = run("points", "--exec", f'echo "{told}" >>{note}')
    assert (status, err) == (0, "")
    assert note.read_text() == "".join(f"{n}, {TIME}, , j, disk0, 4096,\n" for n in (1, 2))
    assert server.acks == [{"id": "j", "sequence": n} for n in (1, 2)]
    lines = out.splitlines()
    assert lines[:2] == [f"job j: point {n} of {TIME}: acknowledged" for n in (1, 2)]
    assert lines[2].startswith("job j ended; ")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("exit 3", "exit status 3"),
        ("kill -9 $$", "signal 9"),
        ("echo a >&2; echo 'b\tc' >&2; echo ' ' >&2; false", "exit status 1: b c"),
        ("no-such-command-at-all", "exit status 127: "),
        ("head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1", f"exit status 1: {300 * 'x'}"),
    ],
)
def test_a_command_that_fails_refuses_the_point(
    server: FakeWithPoints, run: Main, command: str, reason: str
) -> None:
    server.count = 1
    status, out, err = run("points", "--exec", command)
    assert status == 0, "the job has ended well"
    (ack,) = server.acks
    assert ack["error"].startswith(reason)
    assert f"nbdmirror: job j: point 1 of {TIME}: the command failed: {ack['error']}\n" in err
    assert "acknowledged" not in out


def test_an_answer_that_was_lost_is_asked_for_again(
    server: FakeWithPoints, run: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without another run of the command."""
    note, execute, lost = tmp_path / "note", Session.execute, [1, 2]

    async def losing(session: Session, command: str, **arguments: Any) -> Any:
        found = await execute(session, command, **arguments)
        if command == "x-nbdmirror-point-ack" and arguments["sequence"] in lost:
            lost.remove(arguments["sequence"])
            raise QMPError("lost")
        return found

    monkeypatch.setattr(Session, "execute", losing)
    server.answers = [{"repeated": False}, {"repeated": True}, {"repeated": False}]
    server.answers.append({"repeated": True})
    status, out, err = run("points", "--exec", f"echo $NBDMIRROR_SEQUENCE >>{note}")
    assert status == 0
    assert note.read_text() == "1\n2\n"
    assert [ack["sequence"] for ack in server.acks] == [1, 1, 2, 2]
    assert out.count(": acknowledged\n") == 2
    lines = "nbdmirror: the connection to the server is lost; trying again\n"
    assert err == 2 * (lines + "nbdmirror: the server answers again: job j\n")


def test_an_acknowledgement_that_is_not_wanted_any_more(server: FakeWithPoints, run: Main) -> None:
    text = "No acknowledgement of point 1 is awaited: the job waits for none now"
    server.answers = [CommandError(text), {"repeated": True}]
    status, out, err = run("points", "--exec", "true")
    assert status == 0
    assert out.count(": acknowledged\n") == 0
    first, second = err.splitlines()
    what = f"not acknowledged: {text}; do not use its snapshot"
    assert first == f"nbdmirror: job j: point 1 of {TIME}: {what}"
    what = "another client has acknowledged it before; do not use this snapshot"
    assert second == f"nbdmirror: job j: point 2 of {TIME}: {what}"


@pytest.mark.parametrize("points", [{}, {"interval-s": 1}, {"auto-point": True}])
def test_a_job_that_waits_for_nobody(
    server: FakeWithPoints, run: Main, points: dict[str, Any]
) -> None:
    server.jobs["j"]["x-nbdmirror-points"] = points
    server.jobs["j"]["copy-mode"] = "points" if points else "background"
    status, out, err = run("points", "--exec", "true")
    assert (status, out) == (1, "")
    why = "awaits no acknowledgements: its points need none" if points else "makes no points"
    line = f"nbdmirror: job j {why}; start one with: nbdmirror mirror --snapshots\n"
    assert one_line(err) == line


def test_a_job_that_fails(server: FakeWithPoints, run: Main) -> None:
    del server.points["awaited"]
    server.plan = {"fail": True}
    status, _, err = run("points", "--exec", "true")
    assert status == 1
    assert "job j failed" in one_line(err)
