"""The matrix of kills some hundred times, with new seeds each time; a round that fails prints what
replays it. `./run soak` is the same for as long as one likes."""

from __future__ import annotations

import sys

import pytest
from stress import soak

pytestmark = pytest.mark.stress

PASSES = 6


def test_rounds_of_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["soak", "--passes", str(PASSES)])
    assert soak.main() == 0
