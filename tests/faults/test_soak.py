"""`./run soak` tells what it has done, goes on after a round that fails, and remembers it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from faults.rounds import Round
from stress import soak
from stress.marathon import Marathon

CELL = "guest, READY, busy"
SEED = 7


def run_soak(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["soak", "--cell", CELL, "--seed", "7", *arguments])
    return soak.main()


def test_a_report(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_soak(monkeypatch, "--passes", "1") == 0
    report = capfd.readouterr().out
    for line in (r"seed +7", r"rounds +1, and 0 that failed", r"hit +1", r"  guest killed +1"):
        assert has_line(report, line), report
    assert has_line(report, r"guest requests +[1-9]\d+") and has_line(
        report, r"bytes compared +\d+"
    )


def test_a_failure(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(Round):
        def run(self) -> NoReturn:
            raise AssertionError("a write is lost")

    monkeypatch.setattr(soak, "Round", Broken)
    assert run_soak(monkeypatch, "--passes", "2") == 1
    report = capfd.readouterr().out
    for seed in (7, 8):
        assert f"FAILED; to replay: ./run soak --passes 1 --cell '{CELL}' --seed {seed}" in report
    assert has_line(report, r"rounds +0, and 2 that failed")


def test_it_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now_s = iter(range(0, 1000, 20))
    monkeypatch.setattr("stress.soak.time.monotonic", lambda: next(now_s))
    monkeypatch.setattr(soak.Soak, "round", lambda *_: None)
    assert run_soak(monkeypatch, "2m") == 0
    assert has_line(capfd.readouterr().out, r"rounds +0, and 0 that failed")


def test_one_server_for_long(folder: Path) -> None:
    """Some stretches of it; that it grows is told by hours of them."""
    marathon = Marathon(folder, SEED)
    marathon.run(lambda: len(marathon.rests) >= 3)
    ended = {what: number for what, number in marathon.done.items() if "ended" in what}
    assert sum(ended.values()) >= 24, ended
    assert marathon.done["ended by pivot"] and marathon.requests, marathon.report()
    marathon.rests = [{"resident KiB": 1 << 20, "threads": 6, "descriptors": 40}] * 20
    marathon.rests += [{"resident KiB": 1 << 21, "threads": 6, "descriptors": 40}] * 20
    with pytest.raises(AssertionError, match="resident KiB: 1048576, and later 2097152"):
        marathon.assert_flat()


def has_line(text: str, pattern: str) -> bool:
    return any(re.fullmatch(pattern, line) for line in text.splitlines())
