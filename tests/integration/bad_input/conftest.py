"""A disk, and a server that has it."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.bad_input.badparts import SIZE
from support.fixtures import Start
from support.servers import Nbdmirror


@pytest.fixture
def size() -> int:
    return SIZE


@pytest.fixture
def server(start: Start, disk: Path) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, disk, bare=True))
