"""What came of the runs, as a table in Markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree as ET

VERSIONS = ("Python", "nbdkit", "libnbd", "QEMU")


@dataclass(slots=True)
class Outcome:
    """Of one system. What is not known stays empty."""

    system: str
    versions: dict[str, str] = field(default_factory=dict)
    demo: str = ""
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    """The names of tests."""
    skipped: Counter[str] = field(default_factory=Counter)
    """How many, by the reason."""
    problem: str = ""
    """Why there are no results, or why they are not all."""

    @property
    def is_good(self) -> bool:
        return self.demo == "passed" and self.passed > 0 and not (self.failed or self.problem)

    def read_results(self, path: Path) -> None:
        """pytest's file in JUnit's format."""
        try:
            cases = list(ET.parse(path).iter("testcase"))
        except (OSError, ET.ParseError):
            self.problem = "the tests ended without results"
            return
        for case in cases:
            skipped = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                self.failed.append(f"{case.get('classname')}.{case.get('name')}")
            elif skipped is not None:
                self.skipped[skipped.get("message", "no reason given")] += 1
            else:
                self.passed += 1


def read_versions(text: str) -> dict[str, str]:
    """Of lines "NAME VERSION"; words behind the version are a packager's."""
    pattern = re.compile(rf"^({'|'.join(VERSIONS)}) (\d\S*)", re.MULTILINE)
    return {match[1]: match[2] for match in pattern.finditer(text)}


def as_markdown(outcomes: Iterable[Outcome]) -> str:
    """A row for each system; below the table what failed, and why others were skipped."""
    lines = [_row("System", *VERSIONS, "`./run demo`", "Passed", "Failed", "Skipped")]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    notes = []
    for one in outcomes:
        versions = [one.versions.get(name, "") for name in VERSIONS]
        counts = [one.passed, len(one.failed), one.skipped.total()]
        lines.append(_row(one.system, *versions, one.demo, *counts))
        notes += [f"- {one.system}: {one.problem}"] if one.problem else []
        notes += [f"- {one.system}, failed: {name}" for name in one.failed]
        for reason, count in sorted(one.skipped.items()):
            notes.append(f"- {one.system}, skipped {count}: {reason}")
    return "\n".join([*lines, *(["", *notes] if notes else []), ""])


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) or '-' for cell in cells)} |"
