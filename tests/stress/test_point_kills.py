"""Mirrors with points, and some hundred kills of source, far side and both."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.mirror.points.test_points_killed import whatever_is_killed
from support.fixtures import Identical, Start

pytestmark = pytest.mark.stress

ROUNDS = 100


@pytest.mark.parametrize("keep_s", [0, 3600], ids=["last point", "history"])
def test_hundreds_of_kills(start: Start, folder: Path, identical: Identical, keep_s: int) -> None:
    whatever_is_killed(start, folder, identical, keep_s, ROUNDS)
