"""A server that is killed in the middle of its orderly end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from integration.state.stateparts import GRANULE, SIZE, begin, finish
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import MiB
from support.kept import Kept
from support.processes import freeze, patched
from support.servers import QemuNbd

KILLED_AT_ITS_END = """
import os, signal
from nbdmirror.state.store import DiskStore

def finish(self):
    if os.path.exists({flag!r}):
        os.kill(os.getpid(), signal.SIGKILL)

DiskStore.finish = finish
"""


class KilledAtItsEnd(Kept):
    def environment(self) -> dict[str, str]:
        code = KILLED_AT_ITS_END.format(flag=str(self.folder / "kill"))
        return patched(super().environment(), self.folder, code)


@pytest.mark.guarantee("A mirror continues where it was")
def test_a_server_that_is_killed_while_it_ends_forgets_nothing(
    start: Start, folder: Path, identical: Identical, target: QemuNbd, disk: Path
) -> None:
    """Its jobs have ended by then. A supervisor that waits no longer does this."""
    server = start(KilledAtItsEnd(folder, disk))
    begin(server, target).wait_ready()
    freeze(target.pid)
    try:
        with connected(server.uri()) as guest:
            for number in range(8):
                guest.pwrite(bytes([number + 1]) * GRANULE, number * MiB)
        (folder / "kill").touch()
        assert server.process is not None
        server.process.terminate()
        server.process.wait(30)
        server.kill()
    finally:
        os.kill(target.pid, signal.SIGCONT)
    (folder / "kill").unlink()
    server.restart()
    assert 8 * GRANULE <= finish(server) < SIZE
    identical(disk, target.image)
