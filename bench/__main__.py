"""`python -m bench`: nbdmirror and its peers on the same work, alternating, as a table of ratios.

Only ratios mean something, and only between figures of one run. The subjects of a row take turns
within each round, and the first of a round is another one each time.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import curves, results
from bench.lab import Lab
from bench.processes import BenchError
from bench.rows import ROWS, Row

DOCS = Path(__file__).resolve().parent.parent / "docs"
STORED, STORED_QUICK = DOCS / "bench.json", DOCS / "bench-quick.json"
"""What `--check` compares with: small copies and short loads have other ratios."""

ROW_S_MAX = 180.0
"""No further round of a row is begun after this time."""


def main() -> int:
    args = _parser().parse_args()
    if args.list:
        for row in ROWS:
            print(f"{row.name:18} {row.title}{' (not in --quick)' if row.is_slow else ''}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the lab is cleared away
    if args.curve:
        return _curves(args)
    check = STORED_QUICK if args.quick and args.check == STORED else args.check
    stored = results.load(check) if check else []
    rounds = args.rounds or (3 if args.quick else 5)
    found: list[results.Line] = []
    failed: list[str] = []
    with Lab(is_quick=args.quick) as lab:
        images = "memory" if lab.is_in_memory else f"{lab.folder} (no room in /dev/shm)"
        about = results.about(rounds, images, is_quick=args.quick)
        print(f"{about['machine']}; {about['versions']}; images in {images}", flush=True)
        if check and (there := results.other_processors(check, about)):
            print(
                f"{check} was made on {there}: ratios differ between processors; make a run here"
                f" with --json FILE, and compare with --check FILE",
                flush=True,
            )
        try:
            for row in _chosen(args):
                _measure(lab, row, rounds, found, failed)
        finally:  # interrupted: what there is
            _write(args, found, about)
    return _verdict(found, stored, failed)


def _measure(lab: Lab, row: Row, rounds: int, found: list[results.Line], failed: list[str]) -> None:
    """Add the row's lines to `found`, or its name to `failed`."""
    try:
        if row.is_slow:
            lab.clear()
        lines = list(results.lines(row, _rounds(lab, row, rounds)))
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        failed.append(row.name)
        print(f"{row.name:18} NOT MEASURED: {error}", flush=True)
        return
    finally:
        if row.is_slow:
            lab.clear()
    found += lines
    for line in lines:
        print(results.as_text(line), flush=True)


def _write(args: argparse.Namespace, found: list[results.Line], about: dict[str, Any]) -> None:
    if args.json:
        results.save(args.json, found, about)
    if args.markdown:
        args.markdown.write_text(results.as_markdown(found, about))
    if args.plot:
        results.plot(args.plot, found)


def _curves(args: argparse.Namespace) -> int:
    rounds = args.rounds or curves.ROUNDS
    points: list[curves.Point] = []
    with Lab(is_quick=args.quick) as lab:
        about = results.about(rounds, "memory", is_quick=args.quick)
        for curve in curves.CURVES:
            if curve.name in args.curve or "all" in args.curve:
                found = list(curves.measure(lab, curve, rounds))
                print(curves.as_markdown(found), flush=True)
                points += found
    if args.json:
        results.save(args.json, points, about, "points")
    if args.markdown:
        args.markdown.write_text(results.about_markdown(about) + curves.as_markdown(points))
    if args.plot:
        curves.plot(args.plot, points)
    return 0


def _chosen(args: argparse.Namespace) -> list[Row]:
    if not args.row:
        return [row for row in ROWS if not (args.quick and row.is_slow)]
    return [row for row in ROWS if row.name in args.row]


def _rounds(lab: Lab, row: Row, number: int) -> results.Rounds:
    subjects = [results.OURS, *row.peers]
    began_s = time.monotonic()
    rounds = []
    for index in range(number):
        turn = index % len(subjects)
        order = subjects[turn:] + subjects[:turn]
        rounds.append({subject: row.measure(lab, subject) for subject in order})
        if time.monotonic() - began_s > ROW_S_MAX:
            break
    return rounds


def _verdict(found: list[results.Line], stored: list[results.Line], failed: list[str]) -> int:
    for line in found:
        if line.verdict == "BEHIND":
            print(
                f"behind: {line.row} {line.figure} / {line.peer}: {line.ratio:.2f} < {line.must:g}"
            )
    for now, then in results.fallen(found, stored):
        print(f"FELL: {now.row} {now.figure} / {now.peer}: {then.ratio:.2f} -> {now.ratio:.2f}")
        failed.append(now.row)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller disks, shorter loads, fewer rounds")
    names = [row.name for row in ROWS]
    add("--row", action="append", metavar="NAME", choices=names, help="only this row; repeatable")
    names = [curve.name for curve in curves.CURVES] + ["all"]
    add("--curve", action="append", metavar="NAME", choices=names, help="how cost grows with that")
    add("--rounds", type=int, metavar="N", help="rounds of each row (5; with --quick 3)")
    text = "exit 1 if a ratio fell below that of an earlier run (FILE of --json; default: in docs/)"
    add("--check", type=_earlier_run, nargs="?", const=STORED, metavar="FILE", help=text)
    add("--json", type=Path, metavar="FILE", help="write the results as JSON")
    add("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    add("--plot", type=Path, metavar="FILE", help="write a plot, as .svg or .png")
    add("--list", action="store_true", help="list the rows")
    return parser


def _earlier_run(text: str) -> Path:
    try:
        results.load(Path(text))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no file of --json: {error}") from error
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
