"""An image whose snapshots are the points, and a server whose disk is mirrored to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.mirror.snapshots.snapshotsparts import SnapshotFarSide
from support.fixtures import Start
from support.servers import Nbdmirror


@pytest.fixture
def far(start: Start, folder: Path) -> SnapshotFarSide:
    return SnapshotFarSide(start, folder)


@pytest.fixture
def server(start: Start, far: SnapshotFarSide, disk: Path) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, disk, bare=True))
