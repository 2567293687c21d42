"""The disk takes long to make durable what guests have written: a state directory has it flushed
regularly. No guest waits for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from integration.state.stateparts import GRANULE, begin
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import MiB
from support.kept import Kept
from support.processes import patched
from support.servers import QemuNbd
from support.waiting import wait_until

SLOW_DISK = """
import os
from nbdmirror.disk.disk import Disk

sync = Disk.sync

def slow(self):
    if os.path.exists({slow!r}):
        open({asked!r}, "w").close()
    wait_while(lambda: os.path.exists({slow!r}))
    sync(self)

Disk.sync = slow
"""


class SlowDisk(Kept):
    """No flush of its disk ends while the file `slow` exists. Guests' own flushes do."""

    def environment(self) -> dict[str, str]:
        places = {name: str(self.folder / name) for name in ("slow", "asked")}
        return patched(super().environment(), self.folder, SLOW_DISK.format(**places))

    @contextmanager
    def slow(self) -> Iterator[None]:
        flag = self.folder / "slow"
        flag.touch()
        try:
            yield
        finally:
            flag.unlink()


@pytest.mark.guarantee("The pause is bounded")
@pytest.mark.parametrize("command", ["block-job-complete", "block-job-cancel"])
def test_a_mirror_ends_while_its_disk_is_being_flushed(
    start: Start, folder: Path, identical: Identical, target: QemuNbd, disk: Path, command: str
) -> None:
    """What is written down for the end does not wait for the disk, nor do held guests."""
    server = start(SlowDisk(folder, disk))
    qmp = begin(server, target)
    qmp.wait_ready()
    with server.slow(), connected(server.uri()) as guest:
        guest.pwrite(b"\x5a" * GRANULE, MiB)
        wait_until((folder / "asked").exists, "the disk is being flushed")
        qmp.execute(command, device="j")
        assert qmp.wait_for_event("BLOCK_JOB_COMPLETED").get("error") is None
        assert guest.pread(GRANULE, MiB) == b"\x5a" * GRANULE
        guest.pwrite(b"\x5a" * GRANULE, MiB)
    identical(disk, target.image)
