"""A source that sends points to real servers, and the command that recovers them."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from queue import Queue
from typing import TypeVar

from support.processes import ROOT
from support.waiting import wait_until

from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.durable import DurableExport
from nbdmirror.points.ownership import create, take_over
from nbdmirror.points.requests import Program, Side, run
from nbdmirror.points.requests import start as start_program
from nbdmirror.points.writer import JournalWriter

DISK_BYTES = 8 << 20
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
        program = take_over(self.exports, disk_id=block.disk_id, clock=time.monotonic)
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
            data = memoryview(bytes(self.disk[offset : offset + length]))
            if zero:
                self.wait(partial(self.writer.start_zero, offset, length, True))
            else:
                self.wait(partial(self.writer.start_write, data, offset))
        self.wait(self.writer.commit)
        # The superblock is written after the point was announced.
        wait_until(lambda: self.on_loop(lambda: self.writer.is_idle), "the superblock is written")
        self.contents[point.sequence] = bytes(self.disk)

    def close(self) -> None:
        for device in self.devices.values():
            self.on_loop(device.pool.detach)
            device.close()
        self.loop.stop(WAIT_S_MAX)


def nbdmirror(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nbdmirror", *argv],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
    )  # fmt: skip
