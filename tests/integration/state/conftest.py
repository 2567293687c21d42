"""A server with a state directory, its disk, and a target."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.state.stateparts import SIZE
from support.fixtures import Start
from support.images import make_image, make_noise
from support.kept import Kept


@pytest.fixture
def size() -> int:
    return SIZE


@pytest.fixture
def server(start: Start, folder: Path, disk: Path) -> Kept:
    return start(Kept(folder, disk))


@pytest.fixture
def a(start: Start, folder: Path) -> Kept:
    return start(Kept(folder, make_image(folder / "a.img", SIZE), state="state-a"))


@pytest.fixture
def b(start: Start, folder: Path) -> Kept:
    return start(Kept(folder, make_noise(folder / "b.img", SIZE), state="state-b"))
