"""What an applier beside the image says of itself, and who waits for what. The rules together:
tests/model/test_applier.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.points import appliers_block, ownership, withdrawal
from nbdmirror.points.appliers_block import (
    EXPORT_BYTES_MIN,
    GONE_S,
    PLACE_BYTES,
    ApplierBlock,
    Phase,
    Presence,
    Watch,
    has_place,
    read_block,
    write_of,
)
from nbdmirror.points.format import (
    RING_START,
    SAMPLES_MAX,
    JournalError,
    Sample,
    Superblock,
    sealed,
)
from nbdmirror.points.requests import Pause, Program, Side, run

DISK_BYTES = 1 << 20
SAID = ApplierBlock(
    disk_id=b"d" * 16,
    applier=2**64 - 1,
    phase=Phase.DONE,
    serial=7,
    point=3,
    time_ns=-5,
    digest=b"h" * 32,
    samples=tuple(Sample(at << 12, 4096, at) for at in range(SAMPLES_MAX)),
)


class Journal:
    """An export with a journal for an applier."""

    def __init__(self, export_bytes: int = EXPORT_BYTES_MIN) -> None:
        self.device = MemoryDevice(export_bytes)
        program = ownership.create("j", export_bytes, disk_bytes=DISK_BYTES, now_ns=0)
        self.block: Superblock = self.run(program)
        self.size = export_bytes

    def run(self, program: Program[Any]) -> Any:
        return run(program, {Side.JOURNAL: self.device})

    def say(self, phase: Phase, serial: int, applier: int = 1) -> ApplierBlock:
        said = ApplierBlock(self.block.disk_id, applier, phase, serial)
        write_of(self.block, said).run(self.device)
        return said

    def said(self) -> ApplierBlock | None:
        found: ApplierBlock | None = self.run(read_block(self.block, self.size))
        return found


def test_a_block_has_room_for_all() -> None:
    packed = SAID.pack()
    assert len(packed) == 4096
    assert appliers_block.unpack(packed, SAID.disk_id) == SAID


def test_the_newer_block_counts() -> None:
    journal = Journal()
    assert journal.said() is None
    for serial in range(1, 5):
        assert journal.said() != journal.say(Phase.RESTING, serial)
        found = journal.said()
        assert found is not None and found.serial == serial


def test_a_torn_block_leaves_the_one_before() -> None:
    journal = Journal()
    before = journal.say(Phase.RESTING, 1)
    after = replace(before, serial=2, phase=Phase.WORKING)
    at = write_of(journal.block, after).offset
    journal.device.pwrite(after.pack()[:512], at)
    assert journal.said() == before


def test_a_superblock_of_impossible_numbers_is_damaged() -> None:
    """Whatever its checksum says."""
    packed = Journal().block.pack()[:-4]
    for at, length, value in ((8, 8, 2**63), (112, 4, SAMPLES_MAX + 1), (112, 4, 2**32 - 1)):
        changed = packed[:at] + value.to_bytes(length, "little") + packed[at + length :]
        with pytest.raises(JournalError, match="is damaged: its numbers are impossible"):
            Superblock.unpack(sealed(changed))


def test_an_applier_of_another_journal_is_none() -> None:
    journal = Journal()
    write_of(journal.block, SAID).run(journal.device)
    assert journal.said() is None


def test_the_blocks_are_behind_the_ring() -> None:
    journal = Journal()
    end = RING_START + journal.block.ring_bytes
    offsets = {write_of(journal.block, replace(SAID, serial=serial)).offset for serial in (1, 2)}
    assert offsets == {end, end + (64 << 10)}
    assert journal.size - end == PLACE_BYTES


def test_a_small_journal_has_no_place_and_one_that_grows_gets_it() -> None:
    journal = Journal(EXPORT_BYTES_MIN - 4096)
    assert journal.block.ring_bytes == journal.size - RING_START
    assert not has_place(journal.block, journal.size)
    assert journal.said() is None
    assert has_place(journal.block, journal.size + PLACE_BYTES)


def test_the_superblock_keeps_who_applies() -> None:
    block = replace(Journal().block, applier=2**64 - 2, samples=SAID.samples)
    assert Superblock.unpack(block.pack()) == block


def test_a_superblock_of_before_names_no_applier() -> None:
    """What follows the samples was zero."""
    block = replace(Journal().block, samples=SAID.samples)
    assert block.pack()[1464:4092] == bytes(4092 - 1464)
    assert Superblock.unpack(block.pack()).applier == 0


@pytest.mark.parametrize(
    ("looks", "presence"),
    [
        ([(0, None)], Presence.NONE),
        ([(0, (1, Phase.RESTING))], Presence.UNKNOWN),
        ([(0, (1, Phase.RESTING)), (1, (2, Phase.RESTING))], Presence.ALIVE),
        ([(0, (1, Phase.RESTING)), (1, (2, Phase.ENDED))], Presence.NONE),
        ([(0, (1, Phase.RESTING)), (GONE_S, (1, Phase.RESTING))], Presence.GONE),
        ([(0, (1, Phase.RESTING)), (GONE_S - 1, (1, Phase.RESTING))], Presence.UNKNOWN),
        # It may have said that long ago, and be gone since.
        ([(0, (1, Phase.RESTING)), (60, (2, Phase.RESTING))], Presence.UNKNOWN),
        ([(0, (1, Phase.WORKING)), (9, (1, Phase.WORKING)), (10, (2, Phase.DONE))], Presence.ALIVE),
    ],
)
def test_signs_of_life(looks: list[Any], presence: Presence) -> None:
    watch = Watch()
    for now_s, said in looks:
        block = said and replace(SAID, serial=said[0], phase=said[1])
        watch.note(block, now_s)
    assert watch.presence is presence


def test_another_applier_has_to_show_that_it_lives() -> None:
    watch = Watch()
    watch.note(SAID, 0)
    assert watch.note(replace(SAID, applier=5, serial=8), 1) is Presence.UNKNOWN
    assert watch.note(replace(SAID, applier=5, serial=9), 2) is Presence.ALIVE


class Waiting:
    """`until_rests`, with an applier that does something at each pause."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, phases: Sequence[Phase | None]) -> None:
        self.journal = Journal()
        self.pauses = 0
        self._phases = list(phases)
        monkeypatch.setattr(Pause, "run", lambda pause, device: self._pause())
        self._pause()

    def _pause(self) -> None:
        self.pauses += 1
        phase = self._phases.pop(0) if len(self._phases) > 1 else self._phases[0]
        if phase is not None:
            self.journal.say(phase, self.pauses)

    def wait(self) -> None:
        journal = self.journal
        self.journal.run(withdrawal.until_rests("j", journal.block, journal.size))


def test_it_is_waited_for_until_it_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch, [Phase.WORKING] * 9 + [Phase.RESTING])
    waiting.wait()
    assert waiting.pauses == 10


def test_one_that_is_silent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch, [Phase.WORKING, None])
    waiting.wait()
    assert waiting.pauses * withdrawal.PAUSE_S == pytest.approx(GONE_S, abs=0.5)


def test_one_that_does_not_stop_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch, [Phase.WORKING])
    with pytest.raises(JournalError, match="j: an `nbdmirror apply` writes to the image"):
        waiting.wait()
