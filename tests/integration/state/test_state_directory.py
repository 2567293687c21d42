"""The state directory itself: whose it is, what is left in it, and what comes of one that is full
or fails."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from integration.state.stateparts import SIZE, TOLD, begin, finish, settle
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_empty, make_image
from support.kept import Kept, power_cut, refusal
from support.mounts import mounted
from support.processes import patched
from support.servers import QemuNbd
from support.waiting import wait_until


def test_one_server_at_a_time(server: Kept, folder: Path) -> None:
    other = Kept(folder, make_image(folder / "other.img", MiB))
    assert "is in use by another nbdmirror" in refusal(other)


@pytest.mark.parametrize("kind", ["file", "missing parent", "dangling link"])
def test_a_place_that_is_no_directory(folder: Path, disk: Path, kind: str) -> None:
    server = Kept(folder, disk)
    if kind == "file":
        server.state.write_text("mine")
    elif kind == "dangling link":
        server.state.symlink_to(folder / "nowhere")
    else:
        server.options = ("--state-dir", str(folder / "a" / "b"))
    assert "state-dir: " in refusal(server)
    if kind == "file":
        assert server.state.read_text() == "mine"


def test_two_disks_that_share_a_file(folder: Path, disk: Path) -> None:
    """As on a file system that takes VDA for vda; here by a hard link."""
    server = Kept(folder, disk)
    server.disks.append(f"VDA={make_image(folder / 'other.img', MiB)}")
    server.state.mkdir(mode=0o700)
    (server.state / "vda.intents").touch()
    (server.state / "VDA.intents").hardlink_to(server.state / "vda.intents")
    assert "disks vda and VDA would share a file there" in refusal(server)


def test_its_files_are_the_owners_alone(server: Kept, target: QemuNbd) -> None:
    begin(server, target).wait_ready()
    settle(server)
    assert server.state.stat().st_mode & 0o777 == 0o700
    files = {path.name: path.stat().st_mode & 0o777 for path in server.state.iterdir()}
    assert files == dict.fromkeys(("lock", "vda.json", "vda.bitmaps", "vda.intents"), 0o600)
    memory = Path(str(server.definition()["memory"]))
    assert memory.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in memory.iterdir())


def test_links_in_it_are_not_followed(server: Kept, target: QemuNbd, folder: Path) -> None:
    precious = folder / "precious"
    precious.write_text("mine")
    server.stop()
    (server.state / "vda.intents").unlink(missing_ok=True)
    (server.state / "vda.intents").symlink_to(precious)
    assert "state-dir: " in refusal(server)
    (server.state / "vda.intents").unlink()
    (server.state / "vda.json.new").symlink_to(precious)
    server.restart()
    begin(server, target).wait_ready()
    settle(server)
    assert precious.read_text() == "mine"


def test_nothing_is_left_of_what_has_ended(server: Kept, target: QemuNbd) -> None:
    begin(server, target).wait_ready()
    settle(server)
    memory = Path(str(server.definition()["memory"]))
    server.qmp.execute("block-job-cancel", device="j", force=True)
    server.qmp.wait_for_event("BLOCK_JOB_CANCELLED", device="j")
    wait_until((server.state / "vda.last").exists, "how it ended is kept")
    left = {"lock", "vda.intents", "vda.last"}
    assert {path.name for path in server.state.iterdir()} == left
    always = {"alive", "journal", "newest-point", "newest-point-time", "recent"}
    assert {path.name for path in memory.iterdir()} == always
    server.stop()
    assert not memory.exists()


@pytest.mark.guarantee("A state directory that fails ends no guest's I/O")
def test_a_state_directory_that_is_full(
    identical: Identical, start: Start, folder: Path, target: QemuNbd, disk: Path
) -> None:
    """Guests go on, it is told, and when there is room again all is kept again."""
    with mounted("tmpfs", "size=128k") as small:
        server = start(Kept(folder, disk))
        server.stop()
        server.state = small / "state"
        server.options = ("--state-dir", str(server.state))
        server.restart()
        begin(server, target).wait_ready()
        settle(server)
        filler = small / "filler"
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(os.urandom(4096))
        server.allowed.append(TOLD + "|state cannot be saved")
        with Guest(server.uri(), disk, connections=2) as guest:
            identical(guest, target.image)
            text = server.qmp.refusal(
                "block-dirty-bitmap-add", node="vda", name="b", persistent=True
            )
            assert "No space left on device" in text
            server.qmp.wait_for_event("X_NBDMIRROR_STATE_ERROR")
            guest.wait_for_requests(100)
            filler.unlink()
            settle(server)
            guest.wait_for_requests(100)
        power_cut(server)
        server.restart()
        assert finish(server) <= SIZE
        server.stop()


FAILING = """
import errno, os
fsync, fdatasync, flag = os.fsync, os.fdatasync, {flag!r}

def failing(call):
    def wrapped(fd):
        if os.path.exists(flag) and "/state" in os.readlink(f"/proc/self/fd/{{fd}}"):
            raise OSError(errno.EIO, "as ordered")
        return call(fd)
    return wrapped

os.fsync, os.fdatasync = failing(fsync), failing(fdatasync)
"""


class FailingState(Kept):
    """Its state directory fails with EIO while the file `flag` exists."""

    def environment(self) -> dict[str, str]:
        self.flag = self.folder / "fail"
        return patched(super().environment(), self.folder, FAILING.format(flag=str(self.flag)))


@pytest.mark.guarantee("A state directory that fails ends no guest's I/O")
@pytest.mark.parametrize("ending", ["block-job-complete", "block-job-cancel"])
def test_a_state_directory_that_fails(
    identical: Identical, start: Start, folder: Path, target: QemuNbd, disk: Path, ending: str
) -> None:
    """Guests go on; the job does not end before its end is on disk; a forced cancel is heard."""
    server = start(FailingState(folder, disk))
    qmp = begin(server, target)
    qmp.wait_ready()
    settle(server)
    server.flag.touch()
    server.allowed.append(TOLD + "|cannot be saved|cannot be written down")
    with Guest(server.uri(), disk) as guest:
        identical(guest, target.image if ending == "block-job-complete" else disk)
        qmp.execute(ending, device="j")
        qmp.wait_for_event("X_NBDMIRROR_STATE_ERROR")
        guest.wait_for_requests(200)
        assert qmp.job()["status"] in ("ready", "waiting", "pending")
        server.flag.unlink()
        qmp.wait_completed()
        guest.wait_for_requests(50)
    pivoted = (server.state / "vda.pivoted").exists()
    assert pivoted == (ending == "block-job-complete")


def test_a_forced_cancel_does_not_wait_for_a_state_directory_that_fails(
    start: Start, folder: Path, target: QemuNbd, disk: Path
) -> None:
    server = start(FailingState(folder, disk))
    qmp = begin(server, target)
    qmp.wait_ready()
    server.flag.touch()
    server.allowed.append(TOLD + "|cannot be saved")
    qmp.execute("block-job-cancel", device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED", 5, device="j")
    server.flag.unlink()
    wait_until(lambda: not (server.state / "vda.json").exists(), "it is tried again")


def test_a_state_directory_that_is_removed(
    identical: Identical, start: Start, folder: Path, target: QemuNbd, disk: Path
) -> None:
    """A new one in its place is another one: no pivot could be recorded for the next start."""
    server = start(Kept(folder, disk))
    begin(server, target).wait_ready()
    removed = folder / "removed"
    server.state.rename(removed)
    shutil.rmtree(removed)
    server.state.mkdir()
    server.allowed.append(TOLD + "|state cannot be saved")
    with Guest(server.uri(), disk) as guest:
        server.qmp.execute("block-job-complete", device="j")
        reason = server.qmp.wait_for_event("X_NBDMIRROR_STATE_ERROR")["reason"]
        assert "the directory was removed, and has to be there when the server" in reason
        assert str(server.state) in reason
        assert server.job_status()["status"] != "concluded"
        guest.wait_for_requests(50)
        server.qmp.execute("block-job-cancel", device="j", force=True)
        server.qmp.wait_for_event("BLOCK_JOB_CANCELLED")
        guest.wait_for_requests(50)
    identical(guest, disk)


@pytest.mark.parametrize("how", ["moved", "moved and made again", "mounted over"])
def test_a_state_directory_that_is_not_at_its_path_any_more(
    identical: Identical, start: Start, folder: Path, target: QemuNbd, disk: Path, how: str
) -> None:
    """The next start would look elsewhere, and serve the old side of a pivot that was recorded
    here. No pivot takes place before the directory is back."""
    server = start(Kept(folder, disk))
    begin(server, target).wait_ready()
    moved = folder / "moved"
    server.allowed.append(TOLD + "|state cannot be saved")
    with ExitStack() as stack:
        if how == "mounted over":
            other = stack.enter_context(mounted("tmpfs"))
            subprocess.run(["mount", "--bind", other, server.state], check=True)
            stack.callback(lambda: subprocess.run(["umount", server.state], check=True))
        else:
            server.state.rename(moved)
            stack.callback(moved.rename, server.state)
        if how == "moved and made again":
            server.state.mkdir()
            stack.callback(server.state.rmdir)
        server.qmp.execute("block-job-complete", device="j")
        reason = server.qmp.wait_for_event("X_NBDMIRROR_STATE_ERROR")["reason"]
        assert f"the directory is not at its path any more: put it back: '{server.state}'" in reason
        assert server.job_status()["status"] != "concluded"
        (served,) = server.qmp.execute("x-nbdmirror-query-status")["disks"]
        assert served["source"] == str(disk)
    server.qmp.wait_completed()
    server.stop()
    assert "is not the disk any more" in refusal(server)
    identical(disk, target.image)


def test_a_disk_that_is_too_large(folder: Path) -> None:
    """Its log would be as large as a disk. It is served without one."""
    with mounted("tmpfs", "size=1M") as place:
        huge = make_empty(place / "huge.img", 7 << 60)
        server = Kept(folder, huge)
        assert "disk vda has 8070450532247928832 bytes: with a state directory" in refusal(server)
        server.options = ()
        with server, connected(server.uri()) as guest:
            assert guest.get_size() == 7 << 60
