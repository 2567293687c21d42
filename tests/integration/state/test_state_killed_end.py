"""A server that is killed in the middle of its orderly end, or asked to end in the middle of its
start."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from integration.state.stateparts import GRANULE, SIZE, End, begin, ends, finish, settle
from integration.state.test_state_bitmaps import add, bitmaps
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import MiB
from support.kept import Kept
from support.processes import freeze, patched
from support.servers import QemuNbd
from support.waiting import WAIT_S_MAX

KILLED_AT_ITS_END = """
import os, signal
from nbdmirror.state.store import DiskStore

def finish(self, **_):
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


ASKED_TO_END_AT_ITS_START = """
import os, signal, time
from nbdmirror.nbdkit_host import process
from nbdmirror.state.store import DiskStore

begin = DiskStore.begin

def begin_slowly(self, *arguments):
    if os.path.exists({flag!r}):
        os.kill(os.getpid(), signal.SIGTERM)
        deadline_s = time.monotonic() + {start_s}
        wait_while(lambda: not self._is_suspended and time.monotonic() < deadline_s)
    begin(self, *arguments)

DiskStore.begin = begin_slowly
process.LEAVE_S = {leave_s}
"""


class AskedToEndAtItsStart(Kept):
    start_s, leave_s = 1.0, 8.0

    def environment(self) -> dict[str, str]:
        code = ASKED_TO_END_AT_ITS_START.format(
            flag=str(self.folder / "end"), start_s=self.start_s, leave_s=self.leave_s
        )
        return patched(super().environment(), self.folder, code)


class HangsAtItsStart(AskedToEndAtItsStart):
    start_s, leave_s = 60.0, 0.1


@pytest.mark.guarantee("A mirror continues where it was")
@pytest.mark.parametrize("kind", [AskedToEndAtItsStart, HangsAtItsStart])
@ends
def test_a_server_that_is_asked_to_end_while_it_starts_forgets_nothing(
    start: Start,
    folder: Path,
    identical: Identical,
    target: QemuNbd,
    disk: Path,
    end: End,
    kind: type[AskedToEndAtItsStart],
) -> None:
    """It has not taken up yet what the server before it has left."""
    server = start(kind(folder, disk))
    server.allowed.append("the start does not end")
    begin(server, target).wait_ready()
    add(server.qmp)
    settle(server)
    freeze(target.pid)
    try:
        with connected(server.uri()) as guest:
            guest.pwrite(b"x" * GRANULE, 5 * MiB)
        end(server)
        (folder / "end").touch()
        process = server.spawn()
        assert process.wait(WAIT_S_MAX) == (kind is HangsAtItsStart), server.stderr
        assert not server.socket.exists()
        (folder / "end").unlink()
    finally:
        os.kill(target.pid, signal.SIGCONT)
    server.restart()
    assert int(str(bitmaps(server)["b"]["count"])) >= GRANULE
    assert GRANULE <= finish(server) < SIZE
    identical(disk, target.image)
