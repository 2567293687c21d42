"""A server with a state directory, its disk, and a target."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures import Start
from images import make_image, make_noise
from kept import Kept
from servers import QemuNbd
from stateparts import SIZE


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


@pytest.fixture
def target(start: Start, folder: Path) -> QemuNbd:
    return start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))


@pytest.fixture
def server(start: Start, folder: Path, disk: Path) -> Kept:
    return start(Kept(folder, disk))
