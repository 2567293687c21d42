"""A disk, its server, and targets that note what they are asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.rules.rulesparts import SIZE, Logged
from support.fixtures import Start
from support.images import make_noise
from support.paritysides import Faulty
from support.servers import Nbdmirror


@pytest.fixture
def size() -> int:
    return SIZE


@pytest.fixture
def image(folder: Path) -> Path:
    return make_noise(folder / "target.img", SIZE)


@pytest.fixture
def logged(start: Start, folder: Path, image: Path) -> Logged:
    return start(Logged(folder, image))


@pytest.fixture
def faulty(start: Start, folder: Path, image: Path) -> Faulty:
    return start(Faulty(folder, image))


@pytest.fixture
def server(start: Start, disk: Path) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, f"src={disk}", bare=True))
