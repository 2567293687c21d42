"""State directories of an older nbdmirror (tests/data/state-v1): this one takes each of them up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from integration.state.stateparts import finish
from integration.state.test_state_bitmaps import bitmaps
from support.clients import connected
from support.fixtures import Start
from support.goldenstate import CASES, JSON_FILES, Golden, unsealed
from support.images import assert_identical
from support.kept import Kept, power_cut, refusal
from support.servers import QemuNbd

from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.state.disk_file import DiskIdentity
from nbdmirror.state.disk_record import DiskRecord
from nbdmirror.state.recovery import PivotRecord, recover
from nbdmirror.state.sealed_files import DiskFolder

MIRRORS = {"first-copy": 64, "ready": 3, "requests-under-way": 3, "orderly-end": 0}
"""The cases with a mirror, and how many granules may differ: those that did, and those that were
not flushed on the target."""


class Scene:
    """A golden state directory, its disk and its target, and a server that is not started yet."""

    def __init__(
        self, start: Start, folder: Path, case: str, *, loses_memory: bool = False
    ) -> None:
        self.golden = Golden(case)
        self.disk = folder / "disk.img"
        self.golden.make_images(self.disk, folder / "target.img")
        self.target = start(QemuNbd(folder, folder / "target.img"))
        self.server = Kept(folder, self.disk)
        self.golden.lay(self.server.state, self.disk, self.target.uri(), loses_memory=loses_memory)
        self._start = start

    def begin(self) -> Kept:
        return self._start(self.server)

    @property
    def granule(self) -> int:
        return int(self.golden.about["granule"])

    def check_bitmaps(self, *, is_exact: bool = True) -> None:
        """They have what they had, or that and more of what guests may have written since."""
        for name, granules in self.golden.about["bitmaps"].items():
            count = int(str(bitmaps(self.server)[name]["count"]))
            least = len(granules) * self.granule
            assert count == least if is_exact else count >= least


@pytest.mark.parametrize("loses_memory", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("case", MIRRORS)
def test_a_mirror_goes_on(start: Start, folder: Path, case: str, loses_memory: bool) -> None:
    scene = Scene(start, folder, case, loses_memory=loses_memory)
    server = scene.begin()
    qmp = server.qmp
    kept = scene.golden.said("vda.json")["mirror"]["job"]
    job, said = qmp.job(), server.job_status()
    assert (job["speed"], job["auto-dismiss"]) == (kept["speed_bytes_per_s"], kept["auto_dismiss"])
    assert said["copy-mode"] == kept["copy_mode"]
    scene.check_bitmaps(is_exact=not loses_memory or case == "orderly-end")
    qmp.execute("block-job-set-speed", device="j", speed=0)
    copied = finish(server)
    differed = len(scene.golden.about["differing granules"])
    most = 64 if loses_memory and case != "orderly-end" else MIRRORS[case]
    assert differed * scene.granule <= copied <= most * scene.granule
    assert_identical(scene.disk, scene.target.image)


def test_a_write_that_was_under_way_is_copied(start: Start, folder: Path) -> None:
    """Killed between the write and its mark: the journal alone has it."""
    scene = Scene(start, folder, "requests-under-way")
    for path in Path(str(scene.server.definition()["memory"])).glob("mirror-*"):
        path.write_bytes(bytes(path.stat().st_size))
    server = scene.begin()
    assert finish(server) == 3 * scene.granule
    assert_identical(scene.disk, scene.target.image)


@pytest.mark.parametrize("case", ["bitmaps", "orderly-end"])
def test_bitmaps_have_what_they_had(start: Start, folder: Path, case: str) -> None:
    """And again after this version has been killed, and after a power cut."""
    scene = Scene(start, folder, case)
    server = scene.begin()
    scene.check_bitmaps()
    assert bitmaps(server)["b"]["recording"]
    assert case != "bitmaps" or not bitmaps(server)["off"]["recording"]
    server.kill()
    server.restart()
    scene.check_bitmaps()
    power_cut(server)
    server.restart()
    scene.check_bitmaps(is_exact=False)
    if case == "orderly-end":
        finish(server)
        assert_identical(scene.disk, scene.target.image)


@pytest.mark.parametrize("loses_memory", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("case", ["pivot", "pivot-with-bitmap"])
def test_the_old_side_of_a_pivot_is_refused(
    start: Start, folder: Path, case: str, loses_memory: bool
) -> None:
    scene = Scene(start, folder, case, loses_memory=loses_memory)
    server, target = scene.server, scene.target
    assert f"{scene.disk} is not the disk any more" in refusal(server)
    link = folder / "link.img"
    link.hardlink_to(scene.disk)
    for other in (f"vda={link}", f"vdb={scene.disk}"):
        server.disks = [other]
        assert "--accept-old-side" in refusal(server)
    server.disks = [f"vda={target.uri()}"]
    scene.begin()
    with connected(server.uri()) as guest:
        assert guest.get_size() == scene.golden.about["size"]
    scene.check_bitmaps(is_exact=False)  # an NBD server may have lost what was not flushed


# Granule by granule, and key by key.


@pytest.mark.parametrize("loses_memory", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("case", sorted(set(CASES) - {"pivot"}))  # that one has no bitmaps
def test_what_is_dirty_is_what_it_was(folder: Path, case: str, loses_memory: bool) -> None:
    golden, disk, target_uri = Golden(case), folder / "disk.img", "nbd://b/vda"
    about = golden.about
    size, granule = about["size"], about["granule"]
    golden.make_images(disk, folder / "target.img")
    golden.lay(folder / "state", disk, target_uri, loses_memory=loses_memory)
    source = target_uri if case.startswith("pivot") else str(disk)
    found = recover(DiskFolder(folder / "state"), "vda", DiskIdentity.of(source, size))
    assert found is not None and not found.problem
    # After a kill an NBD server may have lost what was not flushed.
    is_exact = case == "orderly-end" or not (loses_memory or case.startswith("pivot"))

    def dirty_in(key: str) -> set[int]:
        bitmap = DirtyBitmap(size, granule)
        found.restore(bitmap, key)
        return {at // granule for at in range(0, size, granule) if bitmap.is_dirty(at, granule)}

    for record in found.definition.bitmaps:
        expected = set(about["bitmaps"][record.name])
        dirty = dirty_in(record.key)
        assert dirty == expected if is_exact else dirty >= expected
    if (mirror := found.definition.mirror) is not None:
        differing = set(about["differing granules"])
        dirty = dirty_in(mirror.key)
        assert dirty >= differing
        assert not is_exact or len(dirty) == MIRRORS[case]


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_the_files_is_lost(case: str) -> None:
    """What is written again has each key of the old files, and what it held."""
    golden = Golden(case)
    records: dict[str, type[DiskRecord] | type[PivotRecord]] = dict(
        zip(JSON_FILES, (DiskRecord, PivotRecord), strict=True)
    )
    for name in golden.files.keys() & records.keys():
        again = records[name].from_bytes(golden.files[name]).to_bytes()
        check_contains(json.loads(unsealed(again)[1]), golden.said(name))


def check_contains(new: object, old: object) -> None:
    if isinstance(old, dict):
        assert isinstance(new, dict)
        for key, value in old.items():
            check_contains(new[key], value)
    elif isinstance(old, list):
        assert isinstance(new, list)
        for one, other in zip(new, old, strict=True):
            check_contains(one, other)
    else:
        assert new == old
