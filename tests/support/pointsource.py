"""A source that sends points to real servers, and the command that recovers them."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Queue
from typing import TypeVar

from support.fixtures import Start
from support.processes import ROOT
from support.servers import QemuNbd
from support.waiting import wait_until

from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.durable import DurableExport
from nbdmirror.points.applier import apply
from nbdmirror.points.format import RING_BYTES_MIN, RING_START
from nbdmirror.points.ownership import create, take_over
from nbdmirror.points.requests import Program, Side, run
from nbdmirror.points.requests import start as start_program
from nbdmirror.points.writer import JournalWriter

DISK_BYTES = 8 << 20
JOURNAL_BYTES = RING_START + 16 * RING_BYTES_MIN
WAIT_S_MAX = 30.0
Result = TypeVar("Result")


class Source:
    """A source that sends points, in a process that has nothing else."""

    def __init__(self, image: str, journal: str) -> None:
        self.loop = Loop(time.monotonic)
        self.loop.start()
        self.devices = {Side.IMAGE: NbdDevice.open(image), Side.JOURNAL: NbdDevice.open(journal)}
        for device in self.devices.values():
            self.on_loop(partial(device.pool.attach, self.loop, lambda: None))
        self.exports = {side: DurableExport(one) for side, one in self.devices.items()}
        self.disk = bytearray(DISK_BYTES)
        self.contents: dict[int, bytes] = {}
        self.stamps = itertools.count()

    def on_loop(self, call: Callable[[], Result]) -> Result:
        return self.loop.run(call).result(WAIT_S_MAX)

    def run(self, program: Program[Result]) -> Result:
        results: Queue[tuple[Result | None, BaseException | None]] = Queue()
        self.loop.call_soon(
            lambda: start_program(program, self.exports, lambda *found: results.put(found))
        )
        result, error = results.get(timeout=WAIT_S_MAX)
        if error is not None:
            raise error
        assert result is not None or error is None
        return result  # type: ignore[return-value]  # None is a result too

    def wait(self, call: Callable[[Callable[[BaseException | None], None]], None]) -> None:
        errors: Queue[BaseException | None] = Queue()
        self.loop.call_soon(lambda: call(errors.put))
        error = errors.get(timeout=WAIT_S_MAX)
        if error is not None:
            raise error

    def open(self) -> None:
        size = self.devices[Side.JOURNAL].size
        block = run(
            create("j", size, disk_bytes=DISK_BYTES, now_ns=time.time_ns()),
            {Side.JOURNAL: self.devices[Side.JOURNAL]},
        )
        program = take_over(self.exports, disk_id=block.disk_id)
        self.writer: JournalWriter = self.run(program)

    def seed(self) -> None:
        self.run(self.writer.seed(time.time_ns()))
        self.fill(0, DISK_BYTES)
        self.devices[Side.IMAGE].pwrite(self.disk, 0)

    def fill(self, offset: int, length: int) -> None:
        stamp = b"%d" % next(self.stamps)  # no two writes are the same
        self.disk[offset : offset + length] = hashlib.sha256(stamp).digest() * (length // 32)

    def point(self, *ranges: tuple[int, int], zero: bool = False) -> None:
        for offset, length in ranges:
            if zero:
                self.disk[offset : offset + length] = bytes(length)
            else:
                self.fill(offset, length)
        total = sum(length for _, length in ranges)
        point = self.on_loop(lambda: self.writer.begin(time.time_ns(), bytes_max=total))
        for offset, length in ranges:
            data = None if zero else memoryview(bytes(self.disk[offset : offset + length]))
            self.wait(partial(self.writer.put, [(offset, length, data)]))
        self.wait(self.writer.commit)
        # The superblock is written after the point was announced.
        wait_until(lambda: self.on_loop(lambda: self.writer.is_idle), "the superblock is written")
        self.contents[point.sequence] = bytes(self.disk)

    def close(self) -> None:
        devices, self.devices = self.devices, {}
        if not devices:
            return  # a test has closed it
        for device in devices.values():
            self.on_loop(device.pool.detach)
            device.close()
        self.loop.stop(WAIT_S_MAX)


class Far:
    """Two exports of qemu-nbd, and a source with five points, of which the image holds the first.
    The disk is larger than what the points change."""

    def __init__(self, start: Start, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []
        uris = []
        self.servers: list[QemuNbd] = []
        for name, size in (("image", DISK_BYTES), ("journal", JOURNAL_BYTES)):
            (folder / name).mkdir()
            self.files.append(folder / name / name)
            self.files[-1].touch()
            with self.files[-1].open("r+b") as file:
                file.truncate(size)
            self.servers.append(start(QemuNbd(folder / name, self.files[-1])))
            uris.append(self.servers[-1].uri())
        self.image, self.journal = uris
        self.source = Source(self.image, self.journal)
        self.source.open()
        self.source.seed()
        self.source.point((0, 64 << 10))
        self.source.point((1 << 20, 3 << 20), (4096, 4096))
        self.source.point((2 << 20, 1 << 20), (0, 16384), zero=True)
        self.source.point((2 << 20, 65536))
        self.source.run(apply(self.source.writer, 1))
        self.source.point((7 << 20, 1 << 20), (2 << 20, 4096))

    def bytes(self) -> list[bytes]:
        return [file.read_bytes() for file in self.files]

    def options(self, *more: str) -> tuple[str, ...]:
        return ("--journal", self.journal, "--read-only", *more)

    def refused(self, *argv: str) -> str:
        """The line with which `nbdmirror serve` refuses. Nothing has changed."""
        before = self.bytes()
        socket, qmp = self.folder / "none", self.folder / "none-qmp"
        done = nbdmirror("serve", *argv, "--socket", str(socket), "--qmp", str(qmp))
        assert done.returncode in (1, 2)
        assert done.stderr.count("\n") == 1, done.stderr
        is_same = before == self.bytes()
        assert is_same, "the image or the journal has changed"
        return done.stderr


def read(device: NbdDevice, offset: int = 0, length: int = DISK_BYTES) -> bytes:
    found = bytearray(length)
    device.pread(memoryview(found), offset)
    return bytes(found)


def nbdmirror(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nbdmirror", *argv],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
    )  # fmt: skip
