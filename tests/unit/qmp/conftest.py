"""A QMP server, and clients of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from unit.qmp.qmpparts import Raw, Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(str(tmp_path / "qmp"))
    server.qmp.start()
    yield server
    server.gate.set()
    server.qmp.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "qmp"]


@pytest.fixture
def connect(server: Server) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def connect(**options: Any) -> Raw:
            client = Raw(server.path, **options)
            stack.callback(client.close)
            return client

        yield connect
