"""Write-blocking: a target that fails holds what a disk holds after a power cut. Of two writes, of
which one was answered before the other was sent, it never has the second alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import KiB, MiB, make_empty
from support.servers import NbdkitTarget, Nbdmirror
from support.waiting import wait_until

SIZE = 4 * MiB
ROUNDS = 20
"""Without the rule about one round in three goes wrong."""

TARGET = f"""
import errno
import nbdkit

API_VERSION = 2
disk = bytearray({SIZE})

def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL

def open(readonly):
    return 1

def get_size(handle):
    return len(disk)

def pread(handle, buffer, offset, flags):
    buffer[:] = disk[offset:offset + len(buffer)]

def pwrite(handle, buffer, offset, flags):
    if offset == 0 and buffer[0]:
        nbdkit.set_error(errno.EIO)
        raise OSError
    disk[offset:offset + len(buffer)] = buffer

def zero(handle, length, offset, flags):
    disk[offset:offset + length] = bytes(length)

def flush(handle, flags):
    pass
"""
"""Whatever is not zero cannot be written to its beginning."""


@pytest.mark.guarantee("A target that fails stays usable")
def test_what_follows_a_failed_write_is_not_on_the_target(
    folder: Path, start: Start, identical: Identical
) -> None:
    plugin = folder / "target.py"
    plugin.write_text(TARGET)
    target = start(NbdkitTarget(folder, "python", str(plugin)))
    server = start(Nbdmirror(folder, make_empty(folder / "disk.img", SIZE), bare=True))
    modes = {"copy_mode": "write-blocking", "on_target_error": "stop"}
    qmp = server.qmp
    with connected(server.uri()) as guest:
        for _ in range(ROUNDS):
            qmp.start_mirror(target.uri(), **modes)
            qmp.wait_ready()
            wait_until(lambda: qmp.job()["actively-synced"], "the target is actively synced")
            guest.pwrite(b"1" * 4 * KiB, 0)
            guest.pwrite(b"2" * 4 * KiB, MiB)
            qmp.wait_for_event("BLOCK_JOB_ERROR", action="stop")
            with connected(target.uri()) as reader:
                assert not any(reader.pread(SIZE, 0))
            guest.zero(SIZE, 0)
            qmp.execute("block-job-resume", device="j")
            wait_until(lambda: qmp.job()["actively-synced"], "the target is actively synced")
            qmp.execute("block-job-cancel", device="j")
            qmp.wait_completed()
    identical(server.uri(), target.uri())
