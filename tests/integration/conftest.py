"""A disk of noise and holes, a target that is full of old noise, and the command line. A folder or
module with disks of another size has its own `size`; `server` is each one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.fixtures import Start
from support.images import MiB, make_image, make_noise
from support.processes import Finished, nbdmirror
from support.servers import Nbdmirror, QemuNbd


@pytest.fixture
def size() -> int:
    """In bytes."""
    return 4 * MiB


@pytest.fixture
def disk(folder: Path, size: int) -> Path:
    return make_image(folder / "disk.img", size)


@pytest.fixture
def target(start: Start, folder: Path, size: int) -> QemuNbd:
    return start(QemuNbd(folder, make_noise(folder / "target.img", size)))


@pytest.fixture
def cli(server: Nbdmirror) -> Callable[..., Finished]:
    """Runs a command against `server`; nothing it says is a traceback."""

    def run(*arguments: str) -> Finished:
        done = nbdmirror(*arguments, "--qmp", server.qmp_path)
        assert "Traceback" not in done.stdout + done.stderr
        return done

    return run
