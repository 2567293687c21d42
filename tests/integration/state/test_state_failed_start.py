"""A start that fails, and a server that only reads, leave what is known of a disk as it was."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from integration.state.stateparts import GRANULE, SIZE, begin, finish
from support.clients import connected
from support.fixtures import Identical
from support.images import MiB, make_image
from support.kept import Kept
from support.processes import patched
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

SECOND_FAILS = """
import errno
from nbdmirror.state.store import DiskStore
begin = DiskStore.begin

def failing(self, *arguments):
    if self.name == "vdb":
        raise OSError(errno.ENOSPC, "No space left on device")
    begin(self, *arguments)

DiskStore.begin = failing
"""


def refused(server: Nbdmirror, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        server.argv(),
        env=environment or server.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def beside(kept: Kept, *disks: str) -> Nbdmirror:
    """Another server with the same disk and state directory."""
    return Nbdmirror(kept.folder, *kept.disks, *disks, options=kept.options)


def port_is_in_use(kept: Kept) -> None:
    """Without the command line, which looks before it starts nbdkit."""
    state = f"state-dir={kept.state}"
    other = Nbdmirror(kept.folder, *kept.disks, bare=True, tcp=True, options=(state,))
    with socket.create_server(("127.0.0.1", other.port)):
        assert "Address already in use" in refused(other)


def second_disk_is_refused(kept: Kept) -> None:
    huge = kept.folder / "huge.img"
    huge.touch()
    os.truncate(huge, 2 << 50)
    assert "with a state directory it may have" in refused(beside(kept, f"vdb={huge}"))


def second_disk_cannot_begin(kept: Kept) -> None:
    """The first one has begun by then."""
    other = beside(kept, f"vdb={make_image(kept.folder / 'vdb.img', MiB)}")
    said = refused(other, patched(other.environment(), kept.folder, SECOND_FAILS))
    assert f"ERROR: state-dir: {kept.state}: No space left on device" in said


def reads_only(kept: Kept) -> None:
    other = beside(kept)
    other.options = (*other.options, "--read-only")
    with other, connected(other.uri()) as guest:
        assert guest.is_read_only()


def target_has_all(job: dict[str, object]) -> bool:
    return not (job["dirty-bytes"] or job["in-flight-bytes"] or job["unflushed-bytes"])


STARTS = (port_is_in_use, second_disk_is_refused, second_disk_cannot_begin, reads_only)
starts = pytest.mark.parametrize("fail", STARTS, ids=[start.__name__ for start in STARTS])


@pytest.fixture
def ended(server: Kept, target: QemuNbd, disk: Path) -> Kept:
    """A mirror with a target that has all, after an orderly end. Beside the disk is a backup."""
    shutil.copy2(disk, disk.with_suffix(".backup"))
    begin(server, target).wait_ready()
    with connected(server.uri()) as guest:
        guest.pwrite(b"x" * GRANULE, 5 * MiB)
        guest.flush()
    wait_until(lambda: target_has_all(server.job_status()), "the target has all")
    server.stop()
    return server


@starts
def test_a_backup_that_is_restored_after_a_start_that_failed(
    identical: Identical, ended: Kept, target: QemuNbd, disk: Path, fail: Callable[[Kept], None]
) -> None:
    """It has an older time, which only a power cut could have left; and there was none."""
    fail(ended)
    backup = disk.with_suffix(".backup")
    with backup.open("rb") as old, disk.open("r+b") as file:  # the same inode, as of cp
        shutil.copyfileobj(old, file)
    shutil.copystat(backup, disk)
    ended.allowed.append("counts as dirty")
    ended.restart()
    copied = finish(ended)
    ended.stop()
    identical(disk, target.image)
    assert copied == SIZE and "was written to after" in ended.stderr


@starts
def test_a_start_that_failed_costs_nothing(
    identical: Identical, ended: Kept, target: QemuNbd, disk: Path, fail: Callable[[Kept], None]
) -> None:
    fail(ended)
    ended.restart()
    assert finish(ended) == 0
    ended.stop()
    identical(disk, target.image)
