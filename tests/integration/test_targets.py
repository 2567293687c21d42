"""Servers that people mirror to, tried: each as a target, with a guest before and after the pivot,
and as a source. What they can do, and what came of it, is the table of docs/targets.md, which is
compared row by row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.fixtures import Start
from support.knownservers import RBD, TARGETS, Target
from support.targettrial import TABLE, try_target


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_target(target: Target, folder: Path, start: Start) -> None:
    try_target(target, folder, start)


def test_the_table_has_these_and_no_others() -> None:
    rows = re.findall(r"^\| (.*?) \| (?:yes|refused) \|", TABLE, flags=re.MULTILINE)
    assert rows == [*(target.title for target in TARGETS), RBD]
