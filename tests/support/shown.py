"""Which tests show which rule (docs/rules.md) and which guarantee (docs/guarantees.md): they have
the marks `@pytest.mark.rule(19)` and `@pytest.mark.guarantee("...")`, as have mutants that must be
caught.

    .venv/bin/python tests/support/shown.py          prints all of them
"""

from __future__ import annotations

import ast
import functools
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

Shown = dict[str, dict[int | str, list[str]]]
"""`rule` and `guarantee` -> a number or a name -> tests as pytest calls them."""


@functools.cache
def shown() -> Shown:
    found: Shown = {"rule": defaultdict(list), "guarantee": defaultdict(list)}
    for path in sorted(TESTS.rglob("*.py")):
        source = path.read_text()
        if "pytest.mark.rule(" not in source and "pytest.mark.guarantee(" not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for kind, what in marks_of(node):
                    found[kind][what].append(f"{path.relative_to(TESTS.parent)}::{node.name}")
    return found


def marks_of(node: ast.FunctionDef | ast.ClassDef) -> Iterator[tuple[str, int | str]]:
    for mark in node.decorator_list:
        if isinstance(mark, ast.Call):
            kind = ast.unparse(mark.func).removeprefix("pytest.mark.")
            if kind in ("rule", "guarantee"):
                for argument in mark.args:
                    yield kind, ast.literal_eval(argument)


if __name__ == "__main__":
    for kind, tests_of in shown().items():
        for what in sorted(tests_of, key=lambda one: (isinstance(one, str), one)):
            sys.stdout.write(f"{kind} {what}\n")
            for test in tests_of[what]:
                sys.stdout.write(f"    {test}\n")
