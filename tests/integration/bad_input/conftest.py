"""A disk, and a server that has it."""

from __future__ import annotations

from pathlib import Path

import pytest
from badparts import SIZE
from fixtures import Start
from images import make_image
from servers import Nbdmirror


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


@pytest.fixture
def server(start: Start, disk: Path) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, disk, bare=True))
