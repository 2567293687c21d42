"""Recovery of several disks: which moment it is, what is refused, and ends at every moment."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from unit.points.guestparts import Guest, a_guest
from unit.points.pointparts import SECOND_NS, FarSide
from unit.points.test_recovery import Dying, Killed

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.points.format import BLOCK_BYTES, RING_START, SLOTS
from nbdmirror.points.group_recovery import recover_group
from nbdmirror.points.superblocks import JournalTaken


@pytest.mark.parametrize(
    ("wanted", "group"),
    [
        (None, 13),
        ("nightly", 11),
        ("1970-01-01T00:00:02Z", 11),
        ("1970-01-01 00:00:04.500+00:00", 12),
        ("2126-01-01", 13),
    ],
)
@pytest.mark.parametrize("disks", [2, 3])
def test_the_newest_moment_that_all_journals_have(
    wanted: str | None, group: int, disks: int
) -> None:
    guest = a_guest(disks)
    found = guest.recover(wanted)
    guest.assert_is(group)
    (instant,) = guest.told
    assert [one.point for one in found] == list(instant)
    assert not any(one.was_done for one in found)
    images = guest.everything()
    again = guest.recover(wanted)
    assert all(one.was_done for one in again)
    assert guest.everything() == images


def test_images_that_hold_a_part_of_it_already() -> None:
    guest = a_guest()
    guest.fars[0].apply(2)
    guest.fars[1].apply(3)
    guest.recover()
    guest.assert_is(13)


def test_a_number_names_no_moment() -> None:
    a_guest().refuses("--point 3: the points of one moment have other numbers", "3")


@pytest.mark.parametrize("wanted", ["weekly", "1970-01-01T00:00:01Z", "1969-01-01"])
def test_a_moment_that_does_not_exist(wanted: str) -> None:
    text = a_guest().refuses(f"no moment of all journals is '{wanted}'", wanted)
    assert "there are 1970-01-01 " in text


def test_a_name_that_one_journal_has_names_no_moment() -> None:
    guest = a_guest()
    guest.point(guest.fars[0], name="weekly")
    guest.refuses("no moment of all journals is 'weekly'", "weekly")


def test_no_moment_of_all() -> None:
    guest = Guest()
    for group in (1, 2, 3):
        guest.point(guest.fars[0], group)
        guest.point(guest.fars[1])
    text = guest.refuses(
        "no moment is in all journals: journal a: 3 of 3 points are of a group, 19"
    )
    assert text.endswith("journal b: 0 of 3 points are of a group")


def test_the_same_number_at_another_time_is_another_moment() -> None:
    guest = a_guest()
    guest.point(guest.fars[0], 15)
    guest.point(guest.fars[1], 15)
    guest.recover()
    guest.assert_is(13)


def test_a_journal_without_a_point() -> None:
    guest = a_guest()
    guest.fars[1].run(guest.fars[1].writer.seed(since_ns=7 * SECOND_NS))
    guest.refuses("journal b: has no point: the image is being copied in place since")


# What is refused.


def test_the_journal_of_the_same_disk_by_another_name() -> None:
    guest = a_guest()
    guest.fars[1].journal.data[:] = guest.fars[0].journal.data
    guest.refuses("journal b: is the journal of the same disk as journal a")


def test_an_image_that_is_too_small() -> None:
    guest = a_guest()
    guest.fars[1].image = MemoryDevice(BLOCK_BYTES)
    guest.refuses("journal b: is the journal of another disk than the image")


def test_images_that_were_mixed_up() -> None:
    guest = a_guest()
    for far in guest.fars:
        far.apply(2)
    one, other = guest.fars
    one.image, other.image = other.image, one.image
    guest.refuses("journal a: the image does not hold point 2")


def test_an_export_that_is_no_journal() -> None:
    guest = a_guest()
    guest.fars[1].journal.data[:] = bytes(guest.fars[1].journal.size)
    guest.refuses("journal b: is not a journal: it is empty")


def test_a_disk_that_was_recovered_alone() -> None:
    guest = a_guest()
    guest.fars[0].recover("1")
    guest.refuses(r"journal a: point 1 of .* was recovered at .*, which is a point of this disk")


def test_disks_that_were_recovered_at_other_moments() -> None:
    guest = a_guest()
    guest.fars[0].recover("2")
    guest.fars[1].recover("3")
    guest.refuses(r"journal a: point 2 of .* was recovered at .*, and journal b: point 3 of ")


@pytest.mark.parametrize("wanted", [None, "nightly", "2126-01-01"])
def test_a_disk_that_was_recovered_says_which_moment_it_is(wanted: str | None) -> None:
    guest = a_guest()
    guest.fars[1].recover("nightly")
    found = guest.recover(wanted)
    guest.assert_is(11)
    assert [one.was_done for one in found] == [False, True]


def test_another_moment_than_that_of_a_recovered_disk() -> None:
    guest = a_guest()
    guest.fars[1].recover("3")
    guest.refuses(r"journal b: point 3 of .*: there is no other moment any more", "nightly")


def test_a_recovered_moment_that_another_journal_does_not_have() -> None:
    guest = a_guest()
    guest.fars[0].recover(str(guest.fars[0].writer.newest.sequence))
    guest.refuses("no moment is in all journals: journal a: 1 of 1 points are of a group")


def test_a_source_that_still_writes_is_refused_and_changes_no_image() -> None:
    guest = a_guest()
    journal = guest.fars[1].journal
    images = [bytes(far.image.data) for far in guest.fars]

    def it_writes(*_: object) -> None:
        guest.point(guest.fars[1])

    with pytest.raises(JournalTaken, match="journal b: another process writes to this journal"):
        recover_group(
            [far.sides for far in guest.fars], wanted=None, now_ns=0, on_instant=it_writes
        )
    assert [bytes(far.image.data) for far in guest.fars] == images
    with pytest.raises(JournalTaken):
        guest.point(guest.fars[0])
    assert guest.fars[1].journal is journal
    guest.recover()
    guest.assert_is(13)


# Damage.


def damage_data(far: FarSide, group: int) -> None:
    (header,) = [one for one in far.read().headers if one.point.group == group]
    far.journal.data[RING_START + header.place + BLOCK_BYTES] ^= 1


def advised(text: str) -> str:
    assert "--point '" in text
    return text.partition("--point '")[2].rstrip("'")


@pytest.mark.parametrize(
    ("damaged", "sound"),
    [
        ([(0, 13)], 12),
        ([(1, 13)], 12),
        ([(0, 13), (1, 12)], 11),
        ([(1, 13), (1, 12)], 11),
        ([(0, 13), (1, 13)], 12),
    ],
)
def test_damage_in_one_journal_leaves_the_moments_before_it(
    damaged: list[tuple[int, int]], sound: int
) -> None:
    guest = a_guest()
    for number, group in damaged:
        damage_data(guest.fars[number], group)
    wanted = None
    for _ in {group for _, group in damaged}:
        text = r"the data at .* is damaged; the newest moment before that, which all journals have"
        wanted = advised(guest.refuses(text, wanted))
    guest.recover(wanted)
    guest.assert_is(sound)


def test_damage_of_two_journals_is_found_at_once() -> None:
    guest = a_guest()
    first, second = guest.fars
    damage_data(first, 13)
    (header,) = [one for one in second.read().headers if one.point.group == 12]
    second.journal.data[RING_START + header.index_place] ^= 1
    # Without the chain of the second one there is no 13.
    text = guest.refuses(r"journal b: points 3 to 5 are lost: the index of point 3 is damaged")
    guest.recover(advised(text))
    guest.assert_is(11)


def test_damage_of_all_moments() -> None:
    guest = a_guest()
    damage_data(guest.fars[1], 11)
    guest.refuses(r"journal b: .* is damaged; no older moment can be recovered", "nightly")


def test_points_that_are_lost() -> None:
    """The user says that an older moment will do."""
    guest = a_guest()
    far = guest.fars[1]
    (header,) = [one for one in far.read().headers if one.point.group == 13]
    far.journal.data[RING_START + header.footer_place] ^= 1
    for slot in SLOTS:  # both superblocks know of the points
        assert far.journal.data[slot]
    text = guest.refuses(r"journal b: points .* are lost: .*; the newest moment before that, which")
    guest.recover(advised(text))
    guest.assert_is(12)


# Ends at every moment.


def dying(guest: Guest, at: int) -> Guest:
    """A copy that dies at its change number `at`."""
    found = copy.copy(guest)
    found.fars = [copy.copy(far) for far in guest.fars]
    countdown = [at]
    for far in found.fars:
        for name in ("image", "journal"):
            old = getattr(far, name)
            device = Dying(old.size, description=old.description)
            device.data[:] = old.data
            device.countdown = countdown
            setattr(far, name, device)
    return found


def applied(guest: Guest) -> None:
    for far in guest.fars:
        far.apply(1)


@pytest.mark.parametrize("before", [lambda guest: None, applied], ids=["fresh", "applied"])
@pytest.mark.parametrize(
    ("wanted", "group"), [(None, 13), ("nightly", 11), ("1970-01-01T00:00:04Z", 12)]
)
def test_a_recovery_may_be_killed_at_each_change(
    wanted: str | None, group: int, before: Callable[[Guest], None]
) -> None:
    original = a_guest()
    before(original)
    deaths = 0
    for at in range(1, 1000):
        guest = dying(original, at)
        try:
            guest.recover(wanted)
        except Killed:
            deaths += 1
        else:
            break
        guest.recover(wanted)
        guest.assert_is(group)
    assert deaths >= 10


def test_a_recovery_may_be_killed_again_and_again() -> None:
    original = a_guest(3)
    for step in (1, 2, 3, 7):
        guest, changes = dying(original, step), 0
        while True:
            changes += 1
            assert changes < 200, "it never ends"
            device = guest.fars[0].image
            assert isinstance(device, Dying)
            device.countdown[0] = step + changes
            try:
                guest.recover()
            except Killed:
                continue
            break
        guest.assert_is(13)


def test_no_image_is_changed_before_all_sources_are_refused() -> None:
    original = a_guest()
    images = [bytes(far.image.data) for far in original.fars]
    for at in range(1, 1000):
        guest = dying(original, at)
        with pytest.raises(Killed):
            guest.recover()
        if [bytes(far.image.data) for far in guest.fars] != images:
            break
    for far, old in zip(guest.fars, original.fars, strict=True):
        generations = [one.read().superblock.generation for one in (far, old)]
        assert generations[0] != generations[1]
    guest.recover()
    guest.assert_is(13)
