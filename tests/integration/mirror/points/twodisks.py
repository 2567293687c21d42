"""Two disks of one guest, each with a far side of its own, on real servers.

The guest writes each number to the first disk, and then to the second one. So at every moment the
first disk has the numbers of the second one, and at most one more.
"""

from __future__ import annotations

import random
import shutil
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import nbd
from integration.mirror.points.killrounds import BLOCK, content_of
from integration.mirror.points.pointsparts import RING_BYTES, SERVERS, SIZE, FarSide
from support.clients import connected
from support.fixtures import Start
from support.images import assert_identical, make_image
from support.kept import Kept
from support.processes import nbdmirror
from support.seeds import SEED, print_seed
from support.serverprocess import Server
from support.servers import NbdkitTarget
from support.waiting import wait_until

from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.points.reader import read
from nbdmirror.points.requests import Side, run

NAMES = ("vda", "vdb")
INTERVAL_S = 0.2

SERVERS["nbdkit, one thread"] = lambda folder, path: NbdkitTarget(
    folder, "file", f"file={path}", options=("--threads=1",)
)
"""With more threads an nbdkit before 1.34 may end when its client is killed (docs/security.md)."""


class InTurn:
    """A guest. `initial`: what the disks were before."""

    def __init__(self, disks: list[Path], seed: int) -> None:
        self.disks = disks
        self.initial = [disk.read_bytes() for disk in disks]
        self.places: list[list[int]] = [[], []]
        """Where each disk has write n, answered or not."""
        self.answered = 0
        self._rng = random.Random(seed)
        self._is_stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, uris: list[str]) -> None:
        self._is_stopping.clear()
        self._thread = threading.Thread(target=self._run, args=(uris,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Also after its server was killed: then the disks say whether the last write took
        place."""
        self._is_stopping.set()
        assert self._thread is not None
        self._thread.join(30)
        assert not self._thread.is_alive(), "a write does not return"
        for disk, places in zip(self.disks, self.places, strict=True):
            with disk.open("rb") as file:
                file.seek(places[-1])
                if number_of(file.read(BLOCK)) != len(places):
                    del places[-1]

    def wait_for(self, count: int) -> None:
        before = self.answered
        wait_until(lambda: self.answered >= before + count, "the guest writes")

    def _run(self, uris: list[str]) -> None:
        with suppress(nbd.Error), connected(uris[0]) as one, connected(uris[1]) as other:
            if len(self.places[0]) > len(self.places[1]):
                self._write(other, 1)
            while not self._is_stopping.is_set():
                self._write(one, 0)
                self._write(other, 1)
                self.answered += 1

    def _write(self, handle: nbd.NBD, disk: int) -> None:
        self.places[disk].append(self._rng.randrange(SIZE // BLOCK) * BLOCK)
        handle.pwrite(content_of(len(self.places[disk])), self.places[disk][-1])

    def check(self, images: list[bytes]) -> int:
        """The images must be the disks of one moment. Returns the second disk's number."""
        numbers = []
        for initial, places, found in zip(self.initial, self.places, images, strict=True):
            last = max(filter(len(places).__ge__, map(number_of, blocks_of(found))), default=0)
            expected = bytearray(initial)
            for number, place in enumerate(places[:last], start=1):
                expected[place : place + BLOCK] = content_of(number)
            assert_identical(bytes(expected), found)
            numbers.append(last)
        assert numbers[1] <= numbers[0] <= numbers[1] + 1, numbers
        return numbers[1]


def blocks_of(image: bytes) -> list[bytes]:
    return [image[at : at + BLOCK] for at in range(0, len(image), BLOCK)]


def number_of(block: bytes) -> int:
    return int.from_bytes(block[:8], "little") if block == block[:8] * (BLOCK // 8) else 0


class TwoDisks:
    """A server with two disks, each with a far side of its own."""

    def __init__(self, start: Start, folder: Path, *, kind: str = "qemu-nbd") -> None:
        print_seed()
        self.folder = folder
        self.disks = [make_image(folder / f"{name}.img", SIZE, n) for n, name in enumerate(NAMES)]
        self.fars = []
        for name in NAMES:
            (folder / name).mkdir()
            self.fars.append(FarSide(start, folder / name, kind=kind, ring=4 * RING_BYTES))
        self.server = Kept(folder, self.disks[0])
        self.server.disks.append(f"vdb={self.disks[1]}")
        self.server.allowed.append(".*")  # nbdkit complains of guests that it ends on
        start(self.server)
        self.guest = InTurn(self.disks, SEED)

    def begin(self, *more: dict[str, Any]) -> None:
        """`more`: arguments of the jobs, of each or of both."""
        self.server.qmp.execute(
            "transaction",
            actions=self.actions(*more),
            properties={"completion-mode": "grouped"},
        )
        self.wait_ready()

    def actions(self, *more: dict[str, Any]) -> list[dict[str, Any]]:
        options = more * 2 if len(more) < 2 else more
        found = []
        for name, far, extra in zip(NAMES, self.fars, options or ({}, {}), strict=False):
            for node, server in (("image", far.image_server), ("journal", far.journal_server)):
                self.server.qmp.execute(
                    "blockdev-add",
                    **{
                        "driver": "nbd",
                        "node-name": f"{name}-{node}",
                        "server": {"type": "unix", "path": str(server.socket)},
                        "reconnect-delay": 60,
                    },
                )
            data = {
                "job-id": name,
                "device": name,
                "sync": "full",
                "target": f"{name}-image",
                "copy-mode": "points",
                "x-nbdmirror-journal": f"{name}-journal",
                "x-nbdmirror-interval": INTERVAL_S,
            }
            found.append({"type": "blockdev-mirror", "data": data | extra})
        return found

    def wait_ready(self) -> None:
        def are_ready() -> bool:
            jobs = self.server.qmp.execute("query-block-jobs")
            return len(jobs) == 2 and all(job["ready"] and not job["paused"] for job in jobs)

        wait_until(are_ready, "points are made")

    def start_guest(self) -> None:
        self.guest.start([self.server.uri(name) for name in NAMES])

    def far_servers(self) -> list[Server]:
        return [one for far in self.fars for one in (far.image_server, far.journal_server)]

    def kill(self) -> None:
        """The server; and what it has sent arrives."""
        self.server.kill()
        for one in self.far_servers():
            one.stop()
            one.socket.unlink(missing_ok=True)  # nbdkit leaves it
        self.guest.stop()

    def argv(self, suffix: str = "") -> list[str]:
        found = []
        for far in self.fars:
            found += ["--image", str(far.image) + suffix, "--journal", str(far.journal) + suffix]
        return found

    def recover(self, *point: str) -> list[bytes]:
        """From copies, as somebody would have it who has nothing else."""
        for far in self.fars:
            for path in (far.image, far.journal):
                shutil.copyfile(path, f"{path}.copy")
        argv = ("recover", "--group", *self.argv(".copy"), *point)
        done = nbdmirror(*argv)
        assert done.returncode == 0, done.stderr
        again = nbdmirror(*argv)
        assert again.stdout.count(": nothing was changed now") == 2, again.stderr
        return [Path(f"{far.image}.copy").read_bytes() for far in self.fars]

    def groups(self, far: FarSide) -> list[int]:
        with closing(NbdDevice.open(far.journal_server.uri())) as device:
            journal = run(read(device.description, device.size), {Side.JOURNAL: device})
        return [point.group for point in journal.points]

    def wait_for_moments(self, count: int) -> None:
        """That all journals have, or had, and that are new."""
        seen: set[int] = set(self.groups(self.fars[0]))
        before = len(seen)

        def have_come() -> bool:
            common = set(self.groups(self.fars[0])) & set(self.groups(self.fars[1]))
            seen.update(common - {0})
            return len(seen) >= before + count

        wait_until(have_come, "there are moments of both disks")
