"""A guest's database on a disk with points, and some dozens of kills of its server and the far
side, before it is killed itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.test_records import a_database_that_is_recovered
from support.fixtures import Start

pytestmark = pytest.mark.stress

ROUNDS = 30


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_dozens_of_kills(start: Start, folder: Path, journal: str) -> None:
    a_database_that_is_recovered(start, folder, journal, ROUNDS)
