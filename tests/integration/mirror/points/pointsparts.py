"""A far side for points, of real servers, and what is asked about a job that writes to it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.fixtures import Start
from support.images import MiB, make_noise
from support.processes import nbdmirror, run
from support.serverprocess import Server
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.points.format import RING_START

SIZE = 12 * MiB
RING_BYTES = 16 * MiB
INTERVAL_S = 0.1
Servers = dict[str, Callable[[Path, Path], Server]]

SERVERS: Servers = {
    "qemu-nbd": QemuNbd,
    "nbdkit": lambda folder, path: NbdkitTarget(folder, "file", f"file={path}"),
    "nbdkit without FUA": lambda folder, path: NbdkitTarget(
        folder, "file", f"file={path}", "fuamode=emulate", filters=("fua", "nozero", "noextents")
    ),
}


class FarSide:
    """An image full of noise and an empty journal, each on a server of its own."""

    def __init__(
        self, start: Start, folder: Path, *, kind: str = "qemu-nbd", ring: int, size: int = SIZE
    ) -> None:
        self.image = make_noise(self._folder(folder, "image") / "image", size)
        self.journal = self._folder(folder, "journal") / "journal"
        self.journal.write_bytes(b"")
        with self.journal.open("r+b") as file:
            file.truncate(RING_START + ring)
        self.image_server = start(SERVERS[kind](self.image.parent, self.image))
        self.journal_server = start(SERVERS[kind](self.journal.parent, self.journal))

    @staticmethod
    def _folder(folder: Path, name: str) -> Path:
        made = folder / f"far-{name}"
        made.mkdir()
        return made

    def start_mirror(self, server: Nbdmirror, **arguments: Any) -> None:
        server.qmp.start_mirror(
            self.image_server.uri(),
            copy_mode="points",
            x_nbdmirror_journal=self.journal_server.uri(),
            **({"x_nbdmirror_interval": INTERVAL_S} | arguments),
        )

    def servers(self, rng: random.Random) -> list[Server]:
        """Of image and journal, in any order."""
        return rng.sample([self.image_server, self.journal_server], 2)

    def stop(self) -> None:
        self.image_server.stop()
        self.journal_server.stop()

    def recover(self, *point: str) -> bytes:
        """What a user gets who has these two files and nothing else."""
        argv = ("--image", str(self.image), "--journal", str(self.journal), *point)
        done = nbdmirror("recover", *argv)
        assert done.returncode == 0, done.stderr
        return self.image.read_bytes()


def recovered(image: Path, journal: Path, *point: str) -> Path:
    """A copy of the image, made the last point, or the given one; from copies, as somebody would
    have it who has nothing else."""
    copies = [path.with_name(f"{path.name}.copy") for path in (image, journal)]
    for path, copy in zip((image, journal), copies, strict=True):
        run("cp", "--sparse=always", path, copy)
    done = nbdmirror("recover", "--image", str(copies[0]), "--journal", str(copies[1]), *point)
    assert done.returncode == 0, done.stderr
    return copies[0]


def wait_until_points_continue(server: Nbdmirror) -> None:
    qmp = server.qmp
    wait_until(lambda: qmp.job()["ready"] and not qmp.job()["paused"], "points continue")


def last_point(server: Nbdmirror) -> int:
    (job,) = server.qmp.execute("query-block-jobs")
    return int(job["x-nbdmirror-points"].get("sequence", 0))


def wait_for_points(server: Nbdmirror, count: int) -> None:
    before = last_point(server)
    wait_until(lambda: last_point(server) >= before + count, "points")


def wait_for_rest(server: Nbdmirror) -> None:
    """Until the last point has everything, and the image holds that point."""

    def is_at_rest() -> bool:
        return not (left_bytes(server) or points_of(server)["journal-used-bytes"])

    wait_until(is_at_rest, "the image holds everything")


def stop_at_rest(server: Nbdmirror, far: FarSide) -> None:
    """From then on the image holds what the disk holds."""
    wait_for_rest(server)
    server.stop()
    far.stop()


def points_of(server: Nbdmirror) -> dict[str, Any]:
    return dict(server.qmp.job()["x-nbdmirror-points"])


def left_bytes(server: Nbdmirror) -> int:
    (job,) = server.qmp.execute("query-block-jobs")
    return int(job["len"]) - int(job["offset"])
