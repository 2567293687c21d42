"""A guest's database on a disk with points, and kills of its server, of the far side and of itself:
what is recovered is whole, and no older than was told. `./run stress` does the same for longer."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.records import RecordRounds
from support.fixtures import Start
from support.seeds import SEED, print_seed

pytestmark = pytest.mark.timeout(180)

WHICH = ("server", "far side first")


@pytest.mark.guarantee("A point is the disk of one moment")
@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_a_database_that_is_recovered(start: Start, folder: Path, journal: str) -> None:
    a_database_that_is_recovered(start, folder, journal, len(WHICH))


def a_database_that_is_recovered(start: Start, folder: Path, journal: str, count: int) -> None:
    """After so many rounds that the guest lives through there is one that it does not."""
    print_seed()
    rounds = RecordRounds(start, folder, seed=SEED, journal=journal)
    for number in range(count):
        rounds.round(WHICH[number % len(WHICH)])
    rounds.round("guest and all")
