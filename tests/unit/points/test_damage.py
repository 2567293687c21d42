"""Any flipped or torn byte of a journal is noticed and told, and never served."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.points.pointparts import FarSide, with_points

from nbdmirror.points.format import BLOCK_BYTES, RING_START, SLOTS, JournalError

FAR = with_points(3)
USED = FAR.writer.room().used_bytes
HEADERS = FAR.writer.headers


def regions() -> Iterator[tuple[str, int]]:
    """Each block that means something, by a name and the offset in the export."""
    yield from zip(("superblock A", "superblock B"), SLOTS, strict=True)
    for header in HEADERS:
        place = header.place
        while place < header.end:
            at = {
                header.place: "header",
                header.index_place: "index",
                header.footer_place: "footer",
            }
            yield f"{at.get(place, 'data')} of {header.point.sequence}", RING_START + place
            place += BLOCK_BYTES


REGIONS = {f"{name} at {at}": at for name, at in regions()}


def damaged(changes: dict[int, int]) -> FarSide:
    """The far side with bytes of its journal that are other ones: offset -> what is flipped."""
    far = copy.copy(FAR)
    far.journal = copy.copy(FAR.journal)
    far.journal.data = bytearray(FAR.journal.data)
    for at, mask in changes.items():
        far.journal.data[at] ^= mask
    return far


def check_noticed(far: FarSide) -> None:
    """Each point is recovered right or refused, and the damage is told."""
    told: list[str] = []
    try:
        told += far.read().damage
    except JournalError as error:
        told.append(str(error))
    journal = bytes(far.journal.data)
    for sequence in (1, 2, 3):
        far.image = copy.copy(FAR.image)
        far.image.data = bytearray(FAR.image.data)
        far.journal.data = bytearray(journal)
        try:
            far.recover(str(sequence))
        except JournalError as error:
            told.append(str(error))
            assert far.image.data == FAR.image.data, "the image was touched"
            assert far.journal.data == journal, "the journal was touched"
        else:
            assert bytes(far.image.data) == FAR.contents[sequence]
    assert told, "the damage was not noticed"
    assert all("\n" not in line for line in told)


@pytest.mark.parametrize("region", REGIONS)
def test_a_flipped_bit_is_noticed_in_each_region(region: str) -> None:
    for within in (0, 1, 7, 100, 700, 2048, BLOCK_BYTES - 5, BLOCK_BYTES - 1):
        check_noticed(damaged({REGIONS[region] + within: 0x10}))


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("fill", [0, 0xFF])
def test_a_torn_block_is_noticed_in_each_region(region: str, fill: int) -> None:
    for sector in (0, 3, 7):
        far = damaged({})
        at = REGIONS[region] + sector * 512
        if far.journal.data[at : at + 512] == bytes([fill]) * 512:
            continue  # that changes nothing
        far.journal.data[at : at + 512] = bytes([fill]) * 512
        check_noticed(far)


@settings(max_examples=300)
@given(
    changes=st.dictionaries(
        st.tuples(st.sampled_from(sorted(REGIONS.values())), st.integers(0, BLOCK_BYTES - 1)),
        st.integers(1, 255),
        min_size=1,
        max_size=4,
    )
)
def test_any_flipped_bytes_are_noticed(changes: dict[tuple[int, int], int]) -> None:
    check_noticed(damaged({at + within: mask for (at, within), mask in changes.items()}))


def test_what_is_in_no_batch_means_nothing() -> None:
    for at in (SLOTS[0] + BLOCK_BYTES, SLOTS[1] + BLOCK_BYTES, RING_START + USED + 5):
        far = damaged({at: 0xFF})
        assert not far.read().damage
        far.image = copy.copy(FAR.image)
        far.image.data = bytearray(FAR.image.data)
        far.recover()
        assert bytes(far.image.data) == FAR.contents[3]


def test_the_lines_say_what_is_lost_and_what_to_do() -> None:
    footer = RING_START + HEADERS[2].footer_place
    with pytest.raises(JournalError) as caught:
        damaged({footer: 1}).recover()
    assert str(caught.value) == (
        "journal: point 3 is lost: the footer of point 3 is damaged, or was never written; "
        "the newest point before that is 2: name it with --point 2"
    )
    with pytest.raises(JournalError, match="points 2 to 3 are lost: the index of point 2 is dam"):
        damaged({RING_START + HEADERS[1].index_place: 1}).recover()
    with pytest.raises(JournalError, match="has no point any more: points 1 to 3 are lost: "):
        damaged({RING_START + HEADERS[0].place: 1}).recover()
    data = RING_START + HEADERS[1].place + BLOCK_BYTES
    with pytest.raises(JournalError) as caught:
        damaged({data: 1}).recover()
    assert str(caught.value) == (
        "journal: the data at 8192 of the disk, in the batch of point 2 is damaged; "
        "the newest point before that is 1: recover it with --point 1"
    )
    far = damaged({SLOTS[0]: 1})
    assert far.read().damage == ("superblock A is no superblock of a journal",)
    far = damaged({SLOTS[0] + 200: 1, SLOTS[1] + 200: 1})
    with pytest.raises(
        JournalError, match=r"journal: superblock A is damaged: .*; superblock B is"
    ):
        far.read()
