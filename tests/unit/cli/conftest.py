"""A server with made-up jobs, and the command line in this process."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fakes import Fake
from unit.cli.cliparts import Main, reached

from nbdmirror.cli import jobs as cli_jobs
from nbdmirror.cli import main as cli
from nbdmirror.cli import watch as cli_watch

parser = functools.cache(cli.build_parser)
"""The same for all commands here: to make it takes longer than most commands."""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(cli_jobs, "POLL_S", 0.01)
    monkeypatch.setattr(cli_watch, "LINES_S", 0.01)
    with reached(Fake(str(tmp_path / "qmp")), monkeypatch) as fake:
        yield fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Main:
    monkeypatch.setattr(cli, "build_parser", parser)

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            status = cli.main(list(argv))
        except SystemExit as left:
            status = int(left.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run
