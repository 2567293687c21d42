"""The disk's storage loses what was not flushed, and the server has ended by then, in whatever way:
nobody is left to notice it, and the target has what is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from integration.state.stateparts import GRANULE, SIZE, begin, finish, settle
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import MiB, make_empty
from support.kept import Kept
from support.losing import Lossy
from support.mounts import loop_device, mounted
from support.servers import QemuNbd
from support.waiting import wait_until

FLUSHES_WHEN_ASKED = """
import nbdmirror.state.store
nbdmirror.state.store.CHECKPOINT_S = 3600.0
"""


class SeldomSaving(Kept):
    """It flushes the disk when a test wants it (`settle`)."""

    patches = FLUSHES_WHEN_ASKED


both_ends = pytest.mark.parametrize("end", [Kept.stop, Kept.kill], ids=["orderly end", "killed"])


@pytest.fixture
def source(start: Start, folder: Path, disk: Path) -> Lossy:
    return start(Lossy(folder, disk))


@pytest.fixture
def server(start: Start, folder: Path, source: Lossy) -> SeldomSaving:
    server = start(SeldomSaving(folder, source.uri()))
    server.allowed.append(".*")
    return server


def copied_and_flushed(server: Kept) -> None:
    def is_all_there() -> bool:
        job = server.job_status()
        return not (job["dirty-bytes"] or job["in-flight-bytes"] or job["unflushed-bytes"])

    wait_until(is_all_there, "the target has flushed all of it")


def end_while_away(server: Kept, source: Lossy, end: Callable[[Kept], None]) -> None:
    """The disk's server has lost power when nbdmirror ends, and is back for the next one."""
    source.kill()
    end(server)
    source.come_back()
    server.restart()


@pytest.mark.guarantee("A mirror continues where it was")
@both_ends
def test_what_an_nbd_server_has_lost_does_not_stay_on_the_target(
    identical: Identical,
    source: Lossy,
    server: SeldomSaving,
    target: QemuNbd,
    end: Callable[[Kept], None],
) -> None:
    begin(server, target).wait_ready()
    settle(server)
    with connected(server.uri()) as guest:
        guest.pwrite(b"lost" * (GRANULE // 4), 5 * MiB)
        copied_and_flushed(server)
    end_while_away(server, source, end)
    assert GRANULE <= finish(server) <= MiB, "the region"
    identical(source.uri(), target.image)


@both_ends
def test_before_the_first_save_everything_is_copied_again(
    identical: Identical,
    source: Lossy,
    server: SeldomSaving,
    target: QemuNbd,
    end: Callable[[Kept], None],
) -> None:
    """What guests wrote before there was a mirror is in no region."""
    with connected(server.uri()) as guest:
        guest.pwrite(b"lost" * (GRANULE // 4), 5 * MiB)
        begin(server, target).wait_ready()
        copied_and_flushed(server)
    end_while_away(server, source, end)
    assert finish(server) == SIZE
    identical(source.uri(), target.image)


@both_ends
def test_what_an_nbd_server_has_flushed_is_not_copied_again(
    identical: Identical,
    source: Lossy,
    server: SeldomSaving,
    target: QemuNbd,
    end: Callable[[Kept], None],
) -> None:
    begin(server, target).wait_ready()
    settle(server)
    with connected(server.uri()) as guest:
        guest.pwrite(b"kept" * (GRANULE // 4), 5 * MiB)
        copied_and_flushed(server)
    settle(server)
    end(server)
    source.kill()
    source.come_back()
    server.restart()
    assert finish(server) == 0
    identical(source.uri(), target.image)


@pytest.mark.guarantee("A mirror continues where it was")
@both_ends
def test_what_a_block_device_has_lost_does_not_stay_on_the_target(
    identical: Identical, start: Start, folder: Path, end: Callable[[Kept], None]
) -> None:
    """Its file's file system has no room for what guests have written. Linux tells that to a flush,
    and only then, and forgets the content at some later moment."""
    size = 4 * SIZE
    target = start(QemuNbd(folder, make_empty(folder / "target.img", size)))
    with mounted("tmpfs", "size=16M") as small, loop_device(make_empty(small / "f", size)) as disk:
        server = start(SeldomSaving(folder, disk))
        server.allowed.append(".*")
        begin(server, target).wait_ready()
        settle(server)
        with connected(server.uri()) as guest:
            for offset in range(0, SIZE, MiB):
                guest.pwrite(b"lost" * (MiB // 4), offset)
        copied_and_flushed(server)
        if end is Kept.kill:
            bitmap = {"node": "vda", "name": "x"}
            server.qmp.execute("block-dirty-bitmap-add", persistent=True, **bitmap)
            text = server.qmp.refusal("block-dirty-bitmap-remove", **bitmap)
            assert "could not be saved" in text, "a flush has failed"
        end(server)
        subprocess.run(["blockdev", "--flushbufs", disk], check=True)
        server.restart()
        assert SIZE // 2 <= finish(server) <= SIZE
        identical(Path(disk).read_bytes(), target.image)
        server.stop()
