"""The event loop that all disks share queries no file: a file system that hangs would hold up the
mirrors, pauses and pivots of all disks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from integration.mirror.points.pointsparts import RING_BYTES, FarSide, last_point
from support.fixtures import Identical, Start
from support.images import MiB, make_noise
from support.kept import Kept
from support.processes import patched
from support.qmpclient import Qmp
from support.servers import QemuNbd
from support.waiting import InThread, wait_until

SIZE = 4 * MiB

WATCHING = """
import builtins, io, os, sys, threading, time

def watched(name, call):
    def look(*arguments, **options):
        path = arguments[0] if arguments else ""
        thread = threading._active.get(threading.get_ident())
        if thread is not None and thread.name == "nbdmirror-loop" and not isinstance(path, int):
            note(name, os.fspath(path))
        elif not isinstance(path, int) and os.fspath(path).startswith({hung!r}):
            while os.path.lexists({flag!r}):
                time.sleep(0.01)
        return call(*arguments, **options)
    return look

def note(name, path):
    if not str(path).startswith({harmless!r}):
        frame, callers = sys._getframe(2), []
        while frame is not None and len(callers) < 6:
            callers.append(frame.f_code.co_qualname)
            frame = frame.f_back
        os.write(notes, f"{{name}}({{path!r}}): {{' < '.join(callers)}}\\n".encode())

notes = os.open({notes!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
for name in {calls!r}:
    setattr(os, name, watched(name, getattr(os, name)))
builtins.open = io.open = watched("open", open)
"""
CALLS = [
    *("access", "chmod", "link", "listdir", "lstat", "mkdir", "open", "readlink", "remove"),
    *("rename", "replace", "rmdir", "scandir", "stat", "statvfs", "symlink", "truncate", "unlink"),
]
HARMLESS = ("/proc/", "/sys/", "/dev/shm/nbdmirror-state-")
"""The kernel's memory, and memory that outlives the process."""


class Watched(Kept):
    """nbdmirror that notes each query of its event loop to a file, in `notes`. Other threads wait
    for what is in `hung` as long as there is `flag`."""

    @property
    def notes(self) -> Path:
        return self.folder / "notes"

    @property
    def flag(self) -> Path:
        return self.folder / "hangs"

    @property
    def hung(self) -> Path:
        return self.folder / "hung"

    def reach(self, server: QemuNbd) -> str:
        """The URI of a server by way of `hung`."""
        link = self.hung / server.socket.name
        link.symlink_to(server.socket)
        return f"nbd+unix:///?socket={link}"

    def environment(self) -> dict[str, str]:
        places = {"notes": str(self.notes), "flag": str(self.flag), "hung": f"{self.hung}/"}
        code = WATCHING.format(calls=CALLS, harmless=HARMLESS, **places)
        return patched(super().environment(), self.folder, code)

    def check(self) -> None:
        assert self.notes.read_text().splitlines() == []


@pytest.fixture
def server(start: Start, folder: Path) -> Watched:
    """One disk is a file, the other one an export on a Unix socket, for one client."""
    source = start(QemuNbd(folder, make_noise(folder / "b.img", SIZE, 3), shared=1))
    server = Watched(folder, make_noise(folder / "a.img", SIZE, 2))
    server.hung.mkdir()
    server.disks.append(f"vdb={server.reach(source)}")
    return start(server)


@pytest.fixture
def target(start: Start, folder: Path) -> Callable[[], QemuNbd]:
    numbers = iter(range(10))

    def target() -> QemuNbd:
        number = next(numbers)
        return start(QemuNbd(folder, make_noise(folder / f"{number}.img", SIZE, 10 + number)))

    return target


def look(qmp: Qmp) -> None:
    for command in ("query-block", "query-block-jobs", "query-named-block-nodes", "query-jobs"):
        qmp.execute(command)
    qmp.execute("x-nbdmirror-query-status")


def test_an_ordinary_life(
    server: Watched, folder: Path, identical: Identical, target: Callable[[], QemuNbd]
) -> None:
    first, second, third = target(), target(), target()
    qmp = server.qmp
    qmp.add_target("t", first)
    qmp.execute("block-dirty-bitmap-add", node="vda", name="kept", persistent=True)
    qmp.start_mirror("t", device="vda")
    qmp.start_mirror(second.uri(), device="vdb", job_id="k", copy_mode="write-blocking")
    qmp.wait_ready("k")
    wait_until(lambda: qmp.job()["ready"], "the mirror is ready")
    look(qmp)
    for job in ("j", "k"):
        qmp.complete(job)
    look(qmp)
    qmp.execute("blockdev-del", node_name="vda")
    qmp.start_mirror(third.uri(), device="vda")
    qmp.wait_ready()
    server.stop()
    server.disks = [f"vda={first.uri()}", f"vdb={second.uri()}"]
    qmp = server.restart()
    wait_until(lambda: qmp.job()["ready"], "the mirror goes on")
    look(qmp)
    qmp.execute("block-job-cancel", device="j")
    qmp.wait_completed()
    server.stop()
    server.check()
    identical(folder / "a.img", first.image)
    identical(folder / "b.img", second.image)
    identical(first.image, third.image)


def test_a_life_with_points(
    start: Start, server: Watched, folder: Path, identical: Identical
) -> None:
    far = FarSide(start, folder, ring=RING_BYTES, size=SIZE)
    far.start_mirror(server, device="vda", x_nbdmirror_spill_bytes=MiB)
    server.qmp.wait_ready()
    before = last_point(server)
    server.qmp.execute("x-nbdmirror-point", id="j")
    wait_until(lambda: last_point(server) > before, "there is a point more")
    look(server.qmp)
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    server.stop()
    server.check()
    identical(folder / "a.img", far.image)


def waits_alone(server: Watched, begin: Callable[[Qmp], None], other: QemuNbd) -> None:
    """The file system hangs while `begin` starts a mirror, and another disk is mirrored."""
    server.flag.touch()
    with Qmp(server.qmp_path) as waiting:
        mirror = InThread(lambda: begin(waiting))
        server.qmp.start_mirror(other.uri(), device="vda", job_id="k")
        server.qmp.wait_ready("k")
        server.qmp.complete("k")
        assert not mirror.has_ended_within(0)
        server.flag.unlink()
        mirror.result()
    server.qmp.wait_ready()
    server.qmp.complete()
    server.stop()
    server.check()


def test_a_targets_socket_whose_file_system_hangs(
    server: Watched, folder: Path, identical: Identical, target: Callable[[], QemuNbd]
) -> None:
    one, other = target(), target()
    uri = server.reach(one)
    waits_alone(server, lambda qmp: qmp.start_mirror(uri, device="vdb"), other)
    identical(folder / "a.img", other.image)
    identical(folder / "b.img", one.image)


def test_a_closed_node_whose_file_system_hangs(
    server: Watched, folder: Path, identical: Identical, target: Callable[[], QemuNbd]
) -> None:
    """The way home of a disk."""
    away, other = target(), target()
    server.qmp.start_mirror(away.uri(), device="vdb", job_id="i")
    server.qmp.wait_ready("i")
    server.qmp.complete("i")
    waits_alone(server, lambda qmp: qmp.start_mirror("vdb", device="vdb"), other)
    identical(folder / "a.img", other.image)
    identical(folder / "b.img", away.image)


def test_a_socket_under_another_name(server: Watched, folder: Path) -> None:
    """The one that a disk is served from. Its server greets no other client."""
    link = folder / "link"
    link.symlink_to(os.path.realpath(server.disks[1].partition("socket=")[2]))
    uri = f"nbd+unix:///?socket={link}"
    mirror = {"sync": "full", "mode": "existing", "target": uri}
    assert "is the disk itself" in server.qmp.refusal("drive-mirror", device="vdb", **mirror)
    in_use = server.qmp.refusal("drive-mirror", device="vda", **mirror)
    assert "is in use: 'vdb' is the same export" in in_use
    server.check()
