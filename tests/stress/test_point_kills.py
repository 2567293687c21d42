"""Mirrors with points, and some hundred kills of source, far side and both."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.mirror.points.test_points_killed import (
    whatever_is_killed,
    whatever_is_killed_beside_an_applier,
)
from support.fixtures import Identical, Start

pytestmark = pytest.mark.stress

ROUNDS = 100
APPLIED_ROUNDS = 40


@pytest.mark.parametrize("keep_s", [0, 3600], ids=["last point", "history"])
def test_hundreds_of_kills(start: Start, folder: Path, identical: Identical, keep_s: int) -> None:
    whatever_is_killed(start, folder, identical, keep_s, ROUNDS)


def test_kills_beside_an_applier(start: Start, folder: Path, identical: Identical) -> None:
    whatever_is_killed_beside_an_applier(start, folder, identical, APPLIED_ROUNDS)
