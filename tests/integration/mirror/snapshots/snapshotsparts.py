"""An image at the far side whose snapshots are copies of its file, and the command that makes them:
`nbdmirror points --exec`."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from integration.mirror.points.pointsparts import INTERVAL_S, SIZE, left_bytes, points_of
from support.fixtures import Start
from support.images import make_noise
from support.processes import nbdmirror_environment, run
from support.servers import Nbdmirror, QemuNbd
from support.waiting import WAIT_S_MAX, wait_until

from nbdmirror.qmp.results import POINT_ACKNOWLEDGED

ACKED = re.compile(r": point ([0-9]+) of (.*): acknowledged$", re.MULTILINE)


def start_mirror(server: Nbdmirror, target: str, **arguments: Any) -> None:
    """Its points are snapshots."""
    server.qmp.start_mirror(
        target,
        copy_mode="points",
        x_nbdmirror_auto_point=False,
        **({"x_nbdmirror_interval": INTERVAL_S} | arguments),
    )


class SnapshotFarSide:
    """An image full of noise, which qemu-nbd serves, and a folder for its snapshots: copies of the
    file, made while the server has it open."""

    def __init__(self, start: Start, folder: Path, fmt: str = "raw", size: int = SIZE) -> None:
        self.folder = folder / "far"
        self.folder.mkdir()
        self.image = make_noise(self.folder / "image", size)
        if fmt == "qcow2":
            noise, self.image = self.image, self.folder / "image.qcow2"
            run("qemu-img", "convert", "-f", "raw", "-O", fmt, noise, self.image)
        self.snapshots = self.folder / "snapshots"
        self.snapshots.mkdir()
        self.server = start(QemuNbd(self.folder, self.image, fmt))
        self._fmt = fmt

    def start_mirror(self, server: Nbdmirror, **arguments: Any) -> None:
        start_mirror(server, self.server.uri(), **arguments)

    @property
    def command(self) -> str:
        """A snapshot that exists already is an error, and one that is not whole has another
        name."""
        place = shlex.quote(str(self.snapshots))
        new = f"{place}/$NBDMIRROR_SEQUENCE"
        copy = f"cp --reflink=auto {shlex.quote(str(self.image))} {new}.new"
        return f"test ! -e {new} && {copy} && mv {new}.new {new}"

    def snapshot(self, number: int) -> bytes:
        return self.raw(self.snapshots / str(number)).read_bytes()

    def raw(self, image: Path) -> Path:
        """The content of an image that nobody uses."""
        if self._fmt == "raw":
            return image
        raw = image.with_name(f"{image.name}.raw")
        run("qemu-img", "check", "-f", self._fmt, image)
        run("qemu-img", "convert", "-f", self._fmt, "-O", "raw", image, raw)
        return raw


class Exec:
    """`nbdmirror points --exec`, running."""

    def __init__(self, server: Nbdmirror, command: str, *options: str) -> None:
        argv = [sys.executable, "-m", "nbdmirror", "points", "--exec", command, *options]
        self._output = [server.folder / f"exec-{os.urandom(4).hex()}" for _ in range(2)]
        with self._output[0].open("w") as out, self._output[1].open("w") as err:
            self.process = subprocess.Popen(
                [*argv, "--qmp", str(server.qmp_path)],
                env=nbdmirror_environment(),
                stdout=out,
                stderr=err,
            )

    def __enter__(self) -> Exec:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S_MAX)

    @property
    def out(self) -> str:
        return self._output[0].read_text()

    @property
    def err(self) -> str:
        return self._output[1].read_text()

    @property
    def acked(self) -> list[int]:
        return [int(number) for number, _ in ACKED.findall(self.out)]

    @property
    def times(self) -> dict[int, str]:
        """The moments of the points that are acknowledged, as their commands have them."""
        return {int(number): time for number, time in ACKED.findall(self.out)}

    def wait_for(self, number: int) -> None:
        """Until so high a point is acknowledged."""

        def is_there() -> bool:
            assert self.process.poll() is None, self.err
            return max(self.acked, default=0) >= number

        wait_until(is_there, f"point {number} is acknowledged")

    def wait_for_more(self, count: int = 1) -> None:
        self.wait_for(max(self.acked, default=0) + count)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(WAIT_S_MAX)


def awaited(server: Nbdmirror) -> int:
    return int(points_of(server).get("awaited", {}).get("sequence", 0))


def wait_for_awaited(server: Nbdmirror) -> int:
    wait_until(lambda: awaited(server) > 0, "a point waits")
    return awaited(server)


def wait_for_rest(server: Nbdmirror, command: Exec) -> None:
    """Until the last point has everything, and `command` knows that it was acknowledged."""

    def is_at_rest() -> bool:
        if left_bytes(server) or awaited(server):
            return False
        # Asked then, since a point may have been acknowledged just now.
        return command.acked[-1] == points_of(server).get("sequence")

    wait_until(is_at_rest, "nothing is left")


def ack(server: Nbdmirror, number: int, **arguments: str) -> bool:
    said = server.qmp.execute("x-nbdmirror-point-ack", id="j", sequence=number, **arguments)
    POINT_ACKNOWLEDGED.check(said, "x-nbdmirror-point-ack")
    return bool(said["repeated"])
