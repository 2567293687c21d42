"""The model of what a disk may hold after a crash allows what it should, and nothing else."""

from __future__ import annotations

import pytest
from faults.sectors import SECTOR, Lost, Sectors

OLD, NEW, NEWER, OTHER = (bytes([n]) * SECTOR for n in range(1, 5))


def zone() -> Sectors:
    """Two sectors: the first was written twice since the last flush, and once without an answer;
    nothing has happened to the second."""
    sectors = Sectors(OLD + OLD)
    for data in (NEW, NEWER):
        sectors.ask(0, data)
        sectors.acknowledge(0, data, durably=False)
    sectors.ask(0, OTHER)
    return sectors


@pytest.mark.parametrize(
    ("content", "is_kept", "is_lost"),
    [
        (NEWER, True, False),
        (OTHER, True, False),
        (NEW, True, True),
        (OLD, True, True),
        (bytes(SECTOR), True, True),
        (OLD, False, False),
        (NEW, False, False),
        (NEWER, False, False),
        (OTHER, False, False),
        (bytes(SECTOR), False, True),
    ],
)
def test_what_may_be_there(content: bytes, is_kept: bool, is_lost: bool) -> None:
    if is_lost:
        with pytest.raises(Lost, match="sector 0"):
            zone().check(0, content + OLD, is_kept=is_kept)
    else:
        zone().check(0, content + OLD, is_kept=is_kept)
    with pytest.raises(Lost, match="sector 1"):
        zone().check(0, content + NEW if not is_lost else NEWER + NEW, is_kept=is_kept)


def test_what_was_flushed_is_certain() -> None:
    sectors = zone()
    sectors.settle(NEWER + OLD, is_kept=True)
    sectors.flush()
    assert sectors.content() == NEWER + OLD
    for is_kept in (True, False):
        for content in (OLD, NEW, OTHER):
            with pytest.raises(Lost):
                sectors.check(0, content + OLD, is_kept=is_kept)


def test_a_write_with_fua_is_certain() -> None:
    sectors = Sectors(OLD)
    for data, durably in ((NEW, False), (NEWER, True)):
        sectors.ask(0, data)
        sectors.acknowledge(0, data, durably=durably)
    with pytest.raises(Lost):
        sectors.check(0, NEW, is_kept=False)


def test_what_was_seen_once_is_there_until_a_storage_loses_it() -> None:
    sectors = zone()
    sectors.settle(OTHER + OLD, is_kept=True)
    with pytest.raises(Lost):
        sectors.check(0, NEWER + OLD, is_kept=True)
    sectors.check(0, OLD + OLD, is_kept=False)
    sectors.settle(OLD + OLD, is_kept=False)
    with pytest.raises(Lost):
        sectors.check(0, OTHER + OLD, is_kept=False)
