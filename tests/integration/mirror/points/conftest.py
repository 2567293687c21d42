"""A far side, and a server whose disk is mirrored to it with points."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.mirror.points.pointsparts import RING_BYTES, FarSide
from support.fixtures import Start
from support.servers import Nbdmirror


@pytest.fixture
def far(start: Start, folder: Path) -> FarSide:
    return FarSide(start, folder, ring=RING_BYTES)


@pytest.fixture
def server(start: Start, far: FarSide, disk: Path) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, disk, bare=True))
