"""A server with one disk of noise and holes, and a target that is full of old noise."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.mirror.mirrorparts import SIZE, qemu_nbd_raw
from support.fixtures import Start
from support.serverprocess import Server
from support.servers import Nbdmirror


@pytest.fixture
def size() -> int:
    return SIZE


@pytest.fixture
def target(start: Start, folder: Path) -> Server:
    """Of old noise, on an independent server."""
    return start(qemu_nbd_raw(folder, SIZE))


@pytest.fixture
def server(start: Start, disk: Path, target: Server) -> Nbdmirror:
    """Started after its target, so ended before it."""
    return start(Nbdmirror(disk.parent, disk, bare=True))
