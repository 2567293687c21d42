"""A disk to serve."""

from __future__ import annotations

from pathlib import Path

import pytest
from images import MiB, make_image


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", 4 * MiB)
