"""A server with one disk, a target, and its QMP."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.sync.syncparts import SIZE
from support.fixtures import Start
from support.qmpclient import Qmp
from support.servers import Nbdmirror, QemuNbd


@pytest.fixture
def size() -> int:
    return SIZE


@pytest.fixture
def server(start: Start, disk: Path, target: QemuNbd) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, f"src={disk}", bare=True))


@pytest.fixture
def qmp(server: Nbdmirror, target: QemuNbd) -> Qmp:
    server.qmp.add_target("tgt", target)
    return server.qmp
