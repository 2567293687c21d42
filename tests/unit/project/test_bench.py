"""What `./run bench` makes of figures: ratios, verdicts, and which rows fell."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.processes import ROOT

from bench import curves, results
from bench.__main__ import STORED, STORED_QUICK
from bench.processes import processor_s
from bench.rows import ROWS, Figure, Goal, Row

LESS, MORE = True, False


def line_of(ours: list[float], theirs: list[float], *, less_is_better: bool) -> results.Line:
    figure = Figure("x", "s", {"qsd": Goal(1.0, 2.0)}, less_is_better=less_is_better)
    row = Row("row", "a row", lambda lab, subject: {}, ("qsd",), (figure,))
    pairs = zip(ours, theirs, strict=True)
    rounds = [{"nbdmirror": {"x": mine}, "qsd": {"x": other}} for mine, other in pairs]
    (line,) = results.lines(row, rounds)
    return line


@pytest.mark.parametrize(
    ("less_is_better", "ratio", "verdict"), [(MORE, 0.5, "BEHIND"), (LESS, 2.0, "aim reached")]
)
def test_ratios_are_of_each_round_and_larger_is_better(
    less_is_better: bool, ratio: float, verdict: str
) -> None:
    line = line_of([1, 10, 6], [2, 20, 3], less_is_better=less_is_better)
    assert (line.ratio, line.verdict) == (ratio, verdict)


def test_a_row_fell_if_no_round_reached_what_is_stored() -> None:
    stored = line_of([2.0], [1.0], less_is_better=MORE)
    fell = line_of([1.5, 1.2, 1.9], [1.0, 1.0, 1.0], less_is_better=MORE)
    assert results.fallen([fell], [stored]) == [(fell, stored)]
    reached_once = line_of([1.5, 1.2, 2.0], [1.0, 1.0, 1.0], less_is_better=MORE)
    slightly = line_of([1.7], [1.0], less_is_better=MORE)
    assert not results.fallen([reached_once], [stored])
    assert not results.fallen([slightly], [stored])
    assert not results.fallen([fell], [])


def test_what_is_stored_can_be_compared_with(tmp_path: Path) -> None:
    line = line_of([2.0], [1.0], less_is_better=MORE)
    results.save(tmp_path / "bench.json", [line], {"date": "today"})
    assert results.load(tmp_path / "bench.json") == [line]


def test_a_run_of_other_processors_is_told(tmp_path: Path) -> None:
    """Ratios differ between processors: rows that fell may be the machine's doing."""
    stored = tmp_path / "bench.json"
    about = {"machine": "2 x A, 23 GiB, Linux 6.1"}
    results.save(stored, [], about)
    assert not results.other_processors(stored, {"machine": "2 x A, 8 GiB, Linux 6.2"})
    assert results.other_processors(stored, {"machine": "4 x A, 23 GiB"}) == "2 x A"
    assert results.other_processors(stored, {"machine": "2 x B, 23 GiB"}) == "2 x A"


@pytest.mark.parametrize("is_quick", [False, True])
def test_stored_results_are_of_all_rows(is_quick: bool) -> None:
    stored = results.load(STORED_QUICK if is_quick else STORED)
    assert {line.row for line in stored} == {
        row.name for row in ROWS if not (is_quick and row.is_slow)
    }


def test_processor_time_is_that_of_all_threads() -> None:
    """Also of one that has ended."""

    def work() -> None:
        while time.thread_time() < 0.02:
            pass

    before_s = time.process_time()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    seen_s, after_s = processor_s(os.getpid()), time.process_time()
    assert before_s + 0.02 <= seen_s <= after_s


def test_a_curve_as_a_table() -> None:
    curve = next(curve for curve in curves.CURVES if curve.name == "disks")
    points = [
        curves.Point("disks", key, x, subject, x)
        for key, _ in curve.figures
        for x in curve.points
        for subject in curve.subjects
    ]
    table = curves.as_markdown(points).splitlines()
    assert table[2] == "| 1 | 1 | 1 | 1 | 1 |"
    assert len(table) == 2 + len(curve.points)


def test_it_lists_its_rows_and_refuses_others(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench"]
    listed = subprocess.run(
        [*command, "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [row.name for row in ROWS]
    refused = subprocess.run(
        [*command, "--row", "no"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "invalid choice: 'no'" in refused.stderr
    for text in ("", "{}", '{"lines": [{}]}'):
        (tmp_path / "x.json").write_text(text)
        compared = subprocess.run(
            [*command, "--check", str(tmp_path / "x.json")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert compared.returncode == 2 and "x.json is no file of --json" in compared.stderr
