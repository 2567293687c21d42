"""A mirror that scans its source first: the scan counts as done in the state directory when what it
has found is there. No intent covers what it finds, so after a power cut nothing else tells it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from integration.state.stateparts import GRANULE, SIZE, TOLD, begin, finish, settle
from support.fixtures import Identical, Start
from support.images import MiB, make_empty
from support.kept import Kept, power_cut
from support.processes import patched
from support.servers import NbdkitTarget, QemuNbd
from support.waiting import wait_until

DATA = [5 * MiB, 11 * MiB, 23 * MiB]
"""Where the disk has a granule of data."""

SLOW_BITMAPS = """
import errno, os
import nbdmirror.state.store
from nbdmirror.state.sealed_files import DiskFolder
nbdmirror.state.store.FORGET_S_MAX = 60.0
prepare, commit = DiskFolder.prepare, DiskFolder.commit

def slow(self, name, content):
    wait_while(lambda: name.endswith(".bitmaps") and os.path.exists({hangs!r}))
    if name.endswith(".bitmaps") and os.path.exists({fails!r}):
        raise OSError(errno.EIO, "as ordered")
    prepare(self, name, content)

def held(self, names, removed=None):
    wait_while(lambda: "vda.json" in (removed or ()) and os.path.exists({hangs_at_end!r}))
    commit(self, names, removed)

DiskFolder.prepare, DiskFolder.commit = slow, held
"""


class SlowBitmaps(Kept):
    """Bitmaps, and nothing else, cannot be saved while a file `fails` or `hangs` exists; nor an end
    while `hangs_at_end` does, which a forced cancel waits for."""

    def environment(self) -> dict[str, str]:
        self.hangs, self.fails = self.folder / "hangs", self.folder / "fails"
        self.allowed.append(TOLD + "|cannot be saved")
        self.hangs_at_end = self.folder / "hangs-at-end"
        flags = ("hangs", "fails", "hangs_at_end")
        code = SLOW_BITMAPS.format(**{flag: str(getattr(self, flag)) for flag in flags})
        return patched(super().environment(), self.folder, code)


@pytest.fixture
def sparse(folder: Path) -> Path:
    disk = make_empty(folder / "sparse.img", SIZE)
    with disk.open("r+b") as file:
        for number, offset in enumerate(DATA):
            file.seek(offset)
            file.write(bytes([number + 1]) * GRANULE)
    return disk


@pytest.fixture
def scanned(folder: Path) -> Path:
    """The scan ends when this file exists."""
    return folder / "scanned"


@pytest.fixture
def empty_target(start: Start, folder: Path) -> QemuNbd:
    return start(QemuNbd(folder, make_empty(folder / "zeroes.img", SIZE)))


@pytest.fixture
def scanning(
    start: Start, folder: Path, sparse: Path, scanned: Path, empty_target: QemuNbd
) -> SlowBitmaps:
    """A mirror whose scan has found nothing yet when the bitmaps are saved."""
    extents, last = [f"until test -e {scanned}; do sleep 0.02; done"], 0
    for offset in DATA:
        extents += [f"echo {last} {offset - last} hole,zero", f"echo {offset} {GRANULE}"]
        last = offset + GRANULE
    extents.append(f"echo {last} {SIZE - last} hole,zero")
    source = start(
        NbdkitTarget(
            folder,
            "eval",
            "thread_model=echo parallel",
            f"get_size=echo {SIZE}",
            f"pread=dd if={sparse} skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none",
            f"pwrite=dd of={sparse} seek=$4 conv=notrunc oflag=seek_bytes status=none",
            "can_write=exit 0",
            "can_flush=exit 0",
            "flush=exit 0",
            "can_extents=exit 0",
            f"extents={'; '.join(extents)}",
        )
    )
    server = start(SlowBitmaps(folder, source.uri()))
    begin(server, empty_target, target_is_zero=True, speed=GRANULE)
    settle(server)
    assert not is_scanned(server)
    return server


def is_scanned(server: Kept) -> bool:
    mirror = server.definition()["mirror"]
    assert isinstance(mirror, dict)
    return bool(mirror["is_scanned"])


def copies(server: Kept) -> Callable[[], bool]:
    """The scan has ended; at that speed most is still to be copied."""
    return lambda: bool(server.qmp.job()["offset"])


@pytest.mark.guarantee("A mirror continues where it was")
@pytest.mark.parametrize("works_again", [False, True])
def test_what_a_scan_has_found_is_kept_before_the_scan_counts(
    identical: Identical,
    scanning: SlowBitmaps,
    scanned: Path,
    sparse: Path,
    empty_target: QemuNbd,
    works_again: bool,
) -> None:
    """The copy does not wait for that: a source whose flushes fail is to be rescued too."""
    scanning.fails.touch()
    scanned.touch()
    wait_until(copies(scanning), "the copy has begun")
    kept = is_scanned(scanning)
    if works_again:
        scanning.fails.unlink()
        wait_until(lambda: is_scanned(scanning), "the scan is kept")
    power_cut(scanning)
    scanning.fails.unlink(missing_ok=True)
    scanning.restart().execute("block-job-set-speed", device="j", speed=0)
    assert finish(scanning) <= len(DATA) * GRANULE
    scanning.stop()
    identical(sparse, empty_target.image)
    assert not kept, "the scan counted before what it has found was kept"


@pytest.mark.parametrize("end", [Kept.kill, Kept.stop], ids=["killed", "orderly end"])
def test_before_the_scan_a_target_has_not_changed(
    identical: Identical,
    scanning: SlowBitmaps,
    scanned: Path,
    sparse: Path,
    empty_target: QemuNbd,
    end: Callable[[Kept], None],
) -> None:
    """What differs is not marked yet: a clean granule need not be the same on both sides."""
    end(scanning)
    scanned.touch()
    scanning.restart().execute("block-job-set-speed", device="j", speed=0)
    assert finish(scanning) <= len(DATA) * GRANULE
    scanning.stop()
    identical(sparse, empty_target.image)


def test_a_scan_that_is_kept_late_keeps_no_job_that_has_ended(
    scanning: SlowBitmaps, scanned: Path
) -> None:
    """Its end is being recorded when the news comes."""
    bitmaps = scanning.state / "vda.bitmaps"
    before = bitmaps.stat().st_ino
    scanning.hangs.touch()
    scanning.hangs_at_end.touch()
    scanned.touch()
    wait_until(copies(scanning), "the copy has begun")
    scanning.qmp.execute("block-job-cancel", device="j", force=True)
    scanning.qmp.wait_status("aborting")
    scanning.hangs.unlink()
    wait_until(lambda: bitmaps.stat().st_ino != before, "what the scan has found is saved")
    for _ in range(3):
        assert scanning.qmp.job()["status"] == "aborting", "and the job has heard of that"
    scanning.hangs_at_end.unlink()
    scanning.qmp.wait_for_event("BLOCK_JOB_CANCELLED", device="j")
    settle(scanning)
    assert not (scanning.state / "vda.json").exists()


def test_a_scan_that_is_kept_is_not_made_again(
    identical: Identical,
    scanning: SlowBitmaps,
    scanned: Path,
    sparse: Path,
    empty_target: QemuNbd,
) -> None:
    scanned.touch()
    wait_until(lambda: is_scanned(scanning), "the scan is kept")
    scanning.qmp.execute("block-job-set-speed", device="j", speed=0)
    scanning.qmp.wait_ready()
    wait_until(lambda: not scanning.job_status()["unflushed-bytes"], "the target is flushed")
    scanning.kill()
    scanning.restart()
    assert finish(scanning) == 0
    scanning.stop()
    identical(sparse, empty_target.image)
