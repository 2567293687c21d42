"""What `nbdmirror points` says of an applier of the journal."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from support.seeds import SEED
from unit.cli.cliparts import Main
from unit.points.pointparts import SECOND_NS, FarSide

from nbdmirror.points.appliers_block import EXPORT_BYTES_MIN, SLOTS, ApplierBlock, Phase, write_of
from nbdmirror.points.format import BLOCK_BYTES, RING_START, Sample, sealed

NUMBER = 7


class Place:
    """A journal with points 1 and 2 in a file, and what an applier says there."""

    def __init__(self, path: Path, run: Main) -> None:
        self.path, self._run = path, run
        self.far = far = FarSide(journal_bytes=EXPORT_BYTES_MIN)
        far.fill(0, len(far.disk))
        far.seed()
        for _ in range(2):
            far.point((0, BLOCK_BYTES))

    def ask(self, point: int) -> None:
        """The source has granted `point`."""
        update = self.far.writer.superblocks.update(applying=point, applier=NUMBER)
        self.far.run(update)

    def say(self, phase: Phase, point: int = 0, serial: int = 1, applier: int = NUMBER) -> None:
        block = self.far.writer.superblocks.current
        said = ApplierBlock(block.disk_id, applier, phase, serial, point, 5 * SECOND_NS)
        write_of(block, said).run(self.far.journal)

    def put(self, block: bytes, slot: int) -> None:
        at = RING_START + self.far.writer.superblocks.current.ring_bytes + SLOTS[slot]
        self.far.journal.pwrite(block, at)

    def shown(self) -> tuple[str, dict[str, Any]]:
        """As text, without the points, and as JSON."""
        self.path.write_bytes(self.far.journal.data)
        texts = []
        for more in ((), ("--json",)):
            status, out, err = self._run("points", str(self.path), *more)
            assert (status, err) == (0, "")
            texts.append(out)
        said = [line for line in texts[0].splitlines()[1:] if "nbdmirror apply" in line]
        return "".join(said), json.loads(texts[1])


@pytest.fixture
def place(tmp_path: Path, run: Main, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TZ", "UTC")
    return Place(tmp_path / "journal", run)


LIFE = "; its last sign of life was at 1970-01-01 00:00:05.000+0000"


def test_without_one(place: Place) -> None:
    text, found = place.shown()
    assert text == "" and found["applier"] is None and found["applier-asked-for"] == 0


@pytest.mark.parametrize(
    ("asked", "phase", "point", "text"),
    [
        (0, Phase.RESTING, 0, f"waits for points{LIFE}"),
        (1, Phase.RESTING, 0, f"waits for points, and is asked for point 1{LIFE}"),
        (2, Phase.WORKING, 2, f"makes the image point 2{LIFE}"),
        (1, Phase.DONE, 1, f"has made the image point 1{LIFE}"),
        (0, Phase.DONE, 1, f"has made the image point 1{LIFE}"),
        (2, Phase.DONE, 1, f"has made the image point 1, and is asked for point 2{LIFE}"),
        (0, Phase.ENDED, 0, "has ended, at 1970-01-01 00:00:05.000+0000"),
        (2, Phase.ENDED, 0, "has ended, at 1970-01-01 00:00:05.000+0000; point 2 waits for it"),
    ],
)
def test_what_it_does(place: Place, asked: int, phase: Phase, point: int, text: str) -> None:
    if asked:
        place.ask(asked)
    place.say(phase, point)
    shown, found = place.shown()
    assert shown == f"  `nbdmirror apply` {text}"
    time = "1970-01-01 00:00:05.000+0000"
    assert found["applier"] == {"phase": phase.name.lower(), "point": point, "time": time}
    assert found["applier-asked-for"] == asked


def test_one_that_is_asked_and_is_another(place: Place) -> None:
    """The one that the superblock names was killed."""
    place.ask(2)
    place.say(Phase.RESTING, applier=NUMBER + 1)
    shown, _ = place.shown()
    assert shown == f"  `nbdmirror apply` waits for points; point 2 waits for another one{LIFE}"


def test_one_that_is_asked_and_says_nothing(place: Place) -> None:
    place.ask(2)
    text, found = place.shown()
    assert text == "  `nbdmirror apply` has said nothing, and is asked for point 2"
    assert found["applier"] is None and found["applier-asked-for"] == 2


def test_of_two_the_sound_one_counts(place: Place) -> None:
    place.say(Phase.DONE, 1, serial=1)
    place.say(Phase.WORKING, 2, serial=2)
    assert place.shown()[1]["applier"]["point"] == 2
    place.put(b"torn", 0)
    assert place.shown()[1]["applier"]["point"] == 1


def test_rubbish_is_no_applier(place: Place) -> None:
    """Also if its checksum is right."""
    rng = random.Random(SEED)
    disk_id = place.far.disk_id
    for _ in range(20):
        place.put(rng.randbytes(BLOCK_BYTES), 0)
        head = struct.pack("<4sIQ16s", b"NBMA", 1, rng.getrandbits(64), disk_id)
        place.put(sealed(head + rng.randbytes(BLOCK_BYTES - len(head) - 4)), 1)
        assert place.shown()[1]["applier"] is None


@pytest.mark.parametrize(
    ("at", "value"),
    [(8, 2**64 - 1), (56, 9), (64, 65), (64, 2**32 - 1)],
    ids=["serial number", "phase", "65 samples", "many samples"],
)
def test_impossible_numbers(place: Place, at: int, value: int) -> None:
    block = place.far.writer.superblocks.current
    samples = (Sample(0, 1, 2),)
    said = ApplierBlock(block.disk_id, NUMBER, Phase.DONE, 3, 1, samples=samples).pack()
    place.put(said, 1)
    assert place.shown()[1]["applier"] is not None
    length = 8 if at == 8 else 4
    changed = said[:at] + value.to_bytes(length, "little") + said[at + length : -4]
    place.put(sealed(changed), 1)
    assert place.shown()[1]["applier"] is None
