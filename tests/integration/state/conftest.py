"""A server with a state directory, its disk, and a target."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures import Start
from kept import Kept
from stateparts import SIZE


@pytest.fixture
def size() -> int:
    return SIZE


@pytest.fixture
def server(start: Start, folder: Path, disk: Path) -> Kept:
    return start(Kept(folder, disk))
