"""Results: medians and ratios of what was measured, as tables and as JSON, and the comparison with
stored ones."""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.measures import Figures
from bench.rows import Figure, Row

OURS = "nbdmirror"

FALL = 0.8
"""A row fell if its ratio is below this part of the stored one, and no single round reached the
stored one: on a shared machine medians of a few seconds move by 10 %."""

Rounds = Sequence[Mapping[str, Figures]]
"""What each round measured: figures by subject."""


@dataclass(frozen=True, slots=True)
class Line:
    """One row's figure against one peer (or against none: a bound). Ratios: larger is better."""

    row: str
    title: str
    figure: str
    unit: str
    peer: str
    ours: float
    theirs: float
    ratio: float
    ratios: tuple[float, ...]
    must: float
    aim: float

    @property
    def key(self) -> tuple[str, str, str]:
        return self.row, self.figure, self.peer

    @property
    def verdict(self) -> str:
        if not self.must:
            return ""
        if self.ratio < self.must:
            return "BEHIND"
        return "aim reached" if self.ratio >= self.aim else "ok"


def lines(row: Row, rounds: Rounds) -> Iterator[Line]:
    for figure in row.figures:
        ours = statistics.median(each[OURS][figure.key] for each in rounds)
        if figure.must_be_under:
            ratio = figure.must_be_under / ours
            yield Line(
                row.name,
                row.title,
                figure.key,
                figure.unit,
                "bound",
                ours,
                figure.must_be_under,
                ratio,
                (ratio,),
                1.0,
                4.0,
            )
        for peer in row.peers:
            yield _line(row, figure, peer, ours, rounds)


def _line(row: Row, figure: Figure, peer: str, ours: float, rounds: Rounds) -> Line:
    """The ratio is the median of the rounds' ratios: neighbours in time share the machine's
    moods."""
    ratios = []
    for each in rounds:
        mine, theirs = each[OURS][figure.key], each[peer][figure.key]
        above, below = (theirs, mine) if figure.less_is_better else (mine, theirs)
        ratios.append(above / below if below else float("inf"))
    goal = figure.goals.get(peer)
    return Line(
        row=row.name,
        title=row.title,
        figure=figure.key,
        unit=figure.unit,
        peer=peer,
        ours=ours,
        theirs=statistics.median(each[peer][figure.key] for each in rounds),
        ratio=statistics.median(ratios),
        ratios=tuple(round(ratio, 3) for ratio in ratios),
        must=goal.must if goal else 0.0,
        aim=goal.aim if goal else 0.0,
    )


def as_text(line: Line) -> str:
    """For a terminal."""
    goal = f"must {line.must:g} aim {line.aim:g}" if line.must else ""
    return (
        f"{line.row:18} {line.ours:10,.4g} {line.unit:20} {line.peer:8} {line.theirs:10,.4g}"
        f"  ratio {line.ratio:6.2f}  {goal:19} {line.verdict}"
    )


def as_markdown(found: Sequence[Line], about: Mapping[str, Any]) -> str:
    head = [
        about_markdown(about)
        + "Ratios: nbdmirror against the peer, larger is better; medians and ranges of the rounds.",
        "",
        "| row | unit | nbdmirror | peer | peer's | ratio | range | must | aim | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [
        f"| {line.title} | {line.unit} | {short(line.ours)} | {line.peer} | {short(line.theirs)}"
        f" | **{line.ratio:.2f}** | {min(line.ratios):.2f}-{max(line.ratios):.2f}"
        f" | {line.must:g} | {line.aim:g} | {line.verdict} |"
        if line.must
        else f"| {line.title} | {line.unit} | {short(line.ours)} | {line.peer}"
        f" | {short(line.theirs)} | **{line.ratio:.2f}**"
        f" | {min(line.ratios):.2f}-{max(line.ratios):.2f} | | | |"
        for line in found
    ]
    return "\n".join([*head, *rows, ""])


def about_markdown(about: Mapping[str, Any]) -> str:
    return (
        f"# Benchmarks\n\nMade by `./run bench` on {about['date']}; {about['machine']};"
        f" {about['versions']}.\n"
        f"{about['rounds']} rounds, alternating; images in {about['images']}.\n"
    )


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def about(rounds: int, images: str, *, is_quick: bool) -> dict[str, Any]:
    """The machine and the programs, for whoever reads the figures later."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    commands = (["nbdkit", "--version"], ["qemu-storage-daemon", "--version"], ["fio", "--version"])
    versions = ", ".join(_first_line(command) for command in commands)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} x {processor}, {memory} GiB, Linux {platform.release()}",
        "versions": f"{versions}, Python {platform.python_version()}",
        "rounds": rounds,
        "is_quick": is_quick,
        "images": images,
    }


def _first_line(command: list[str]) -> str:
    found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return found.stdout.splitlines()[0].split("(")[0].strip() if found.stdout else command[0]


def save(path: Path, found: Sequence[Any], about: Mapping[str, Any], name: str = "lines") -> None:
    """`found` are dataclasses, called `name`."""
    document = {"about": dict(about), name: [asdict(one) for one in found]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def load(path: Path) -> list[Line]:
    stored = json.loads(path.read_text())["lines"]
    return [Line(**{**line, "ratios": tuple(line["ratios"])}) for line in stored]


def other_processors(path: Path, about: Mapping[str, Any]) -> str:
    """The processors of the stored run, if those of this run are others; else ""."""
    there, here = (
        str(one.get("machine", "")).partition(",")[0]
        for one in (json.loads(path.read_text())["about"], about)
    )
    return there if there != here else ""


def fallen(found: Sequence[Line], stored: Sequence[Line]) -> list[tuple[Line, Line]]:
    """(now, stored) of each line that fell. Those that are not stored, or have no goal, are not
    looked at."""
    before = {line.key: line for line in stored}
    pairs = [(line, before[line.key]) for line in found if line.key in before and line.must]
    return [
        (now, then)
        for now, then in pairs
        if now.ratio < FALL * then.ratio and max(now.ratios) < then.ratio
    ]


def plot(path: Path, found: Sequence[Line]) -> None:
    """Bars of the ratios on a logarithmic scale."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    shown = [line for line in found if line.must][::-1]
    names = [f"{line.row} {line.figure} / {line.peer}" for line in shown]
    colours = ["tab:green" if line.ratio >= line.must else "tab:red" for line in shown]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.25 * len(shown)), layout="constrained")
    axes.barh(names, [line.ratio for line in shown], color=colours)
    axes.scatter([line.must for line in shown], names, marker="|", color="black", label="must")
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("nbdmirror / peer, larger is better")
    axes.legend()
    figure.savefig(path)
