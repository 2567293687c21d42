"""Points of a disk in one process, with guests in real threads: each committed point is the
content at its cut. All orders of the steps are in tests/model/test_cut.py."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.seeds import SEED, print_seed
from unit.disk.ledgerthreads import WAIT_S, running
from unit.mirror.pointparts import PointScene

from nbdmirror.devices.base import BlockDevice, MemoryDevice, Run
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import DeviceError
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.point_source import StoreOptions
from nbdmirror.state.spill import SpillFile

MIB = 1 << 20
SIZE = 2 * MIB + 1000
POINTS, GUESTS = 15, 3


@contextmanager
def a_file(folder: Path, size: int = SIZE) -> Iterator[BlockDevice]:
    path = folder / "disk.img"
    path.touch()
    os.truncate(path, size)
    device = FileDevice.open(path)
    yield device
    device.close()


def unexpected(error: OSError) -> None:
    raise AssertionError(error)


@contextmanager
def a_store(kind: str, folder: Path, loop: Loop) -> Iterator[StoreOptions]:
    if kind == "spill":
        spill = SpillFile(folder, 2 * SIZE, loop.call_soon, unexpected)
        yield StoreOptions(64 << 10, spill)
        spill.close()
        assert spill._readers.wait(WAIT_S)
    else:
        yield StoreOptions(64 << 10) if kind == "too small" else StoreOptions()


def content_of(device: BlockDevice) -> bytes:
    buf = bytearray(device.size)
    device.pread(memoryview(buf), 0)
    return bytes(buf)


def guest(scene: PointScene, number: int, over: threading.Event) -> Callable[[], None]:
    """Writes, zeroes and trims anywhere, often in the same places."""
    chance = random.Random(f"{SEED}-{number}")

    def run() -> None:
        disk = scene.disk
        while not over.is_set():
            length = chance.choice((512, 4096, 5000, 65536, 300_032))
            offset = int((SIZE - length) * chance.random() ** 3)
            kind = chance.random()
            if kind < 0.8:
                disk.pwrite(chance.randbytes(64) * (length // 64), offset, kind < 0.05)
            elif kind < 0.9:
                disk.zero(offset, length, may_trim=True, fua=False, fast=False)
            elif kind < 0.95:
                disk.trim(offset, length, fua=False)
            else:
                disk.flush()

    return run


@pytest.mark.parametrize("kind", ["memory", "spill", "too small", "details"])
def test_each_point_is_the_content_of_its_cut(tmp_path: Path, kind: str) -> None:
    print_seed()
    loop = Loop(time.monotonic)
    with a_file(tmp_path) as device, a_store(kind, tmp_path, loop) as store:
        granularity = 65536 if kind == "details" else 4096
        scene = PointScene(device, granularity=granularity, unit=4096, store=store, loop=loop)
        committed, broken = points_beside_guests(scene)
        assert scene.cut()
        assert scene.send()
        assert scene.far == content_of(device)
        assert scene.lag.lag_s == 0
    if kind == "too small":
        assert committed + broken  # guests may have been slow
    else:
        assert committed
        assert not broken


def points_beside_guests(scene: PointScene) -> tuple[int, int]:
    """Returns how many points were committed, and how many were broken."""
    cuts: list[bytes] = []
    scene.at_take = lambda: cuts.append(content_of(scene.device))
    over = threading.Event()
    committed = broken = 0
    with running(*(guest(scene, number, over) for number in range(GUESTS))):
        try:
            for _ in range(POINTS):
                if not scene.cut():
                    continue
                before = bytes(scene.far)
                if scene.send():
                    committed += 1
                    assert scene.far == cuts[-1]
                else:
                    broken += 1
                    assert scene.far == before
        finally:
            over.set()
    return committed, broken


def test_a_point_of_an_idle_disk_is_empty_and_has_no_lag() -> None:
    scene = PointScene(MemoryDevice(MIB))
    assert not scene.points.has_changes
    assert scene.cut()
    assert scene.lag.lag_s == 0
    assert scene.send()
    assert scene.sent_bytes == 0


def test_a_write_of_4k_is_sent_as_4k() -> None:
    scene = PointScene(MemoryDevice(16 * MIB), granularity=65536, unit=4096)
    for _ in range(2):
        scene.changes.look()
    for granule in range(0, 200, 7):
        scene.disk.pwrite(b"x" * 4096, granule * 65536 + 8192, False)
    assert scene.cut()
    for granule in range(0, 200, 7):
        scene.disk.pwrite(b"y" * 4096, granule * 65536 + 8192, False)
    assert scene.send()
    assert scene.sent_bytes == len(range(0, 200, 7)) * 4096


def test_a_long_hole_is_sent_without_reading_it(tmp_path: Path) -> None:
    with a_file(tmp_path, 1 << 30) as device:
        scene = PointScene(device, granularity=65536)
        scene.disk.trim(0, 1 << 30, fua=False)
        assert scene.cut()
        view = scene.points.view
        assert view is not None

        def is_over() -> bool:
            while view.read_next():
                pass
            return len(runs()) == 16

        def runs() -> list[Run]:
            return [run for chunk in scene.chunks for run in chunk.runs]

        scene.until(is_over)
        assert all(content is None for _, _, content in runs())
        assert sum(length for _, length, _ in runs()) == 1 << 30
        assert view.in_flight_bytes == 0


def test_a_read_that_fails_breaks_the_point(monkeypatch: pytest.MonkeyPatch) -> None:
    device = MemoryDevice(MIB)
    scene = PointScene(device)
    scene.disk.pwrite(b"x" * 4096, 0, False)
    assert scene.cut()

    def fail(buf: memoryview, offset: int) -> None:
        raise DeviceError("the disk failed")

    with monkeypatch.context() as patches:
        patches.setattr(device, "pread", fail)
        assert not scene.send()
    assert str(scene.errors[0]) == "the disk failed"
    scene.disk.pwrite(b"y" * 4096, 4096, False)
    assert scene.cut()
    assert scene.send()
    assert scene.far == device.data, "the next point has what the broken one had"
    assert scene.lag.lag_s == 0


def test_a_point_that_is_given_up_is_in_the_next_one() -> None:
    scene = PointScene(MemoryDevice(MIB))
    scene.disk.pwrite(b"x" * 4096, 0, False)
    assert scene.cut()
    scene.points.break_off(DeviceError("the link is cut"))
    scene.disk.pwrite(b"y" * 4096, 0, False)  # saves nothing for a point that is broken
    assert not scene.points.committed()
    assert not scene.send()
    assert scene.cut()
    assert scene.send()
    assert scene.far[:4096] == b"y" * 4096
    scene.points.break_off(DeviceError("nothing is in progress"))
    assert len(scene.errors) == 1


def test_the_lag_is_that_of_the_oldest_write_in_no_point() -> None:
    scene = PointScene(MemoryDevice(MIB))
    now_s = 100.0
    scene.lag._clock = lambda: now_s  # stands still
    scene.loop.clock = lambda: now_s
    assert scene.lag.lag_s == 0
    now_s = 110.0
    scene.disk.pwrite(b"x", 0, False)
    now_s = 111.0
    assert scene.lag.lag_s == 11.0, "a bound: nobody has looked since 100 s"
    assert scene.cut()
    now_s = 112.0
    scene.disk.pwrite(b"y", 0, False)
    assert scene.lag.lag_s == 12.0, "cut, and not committed"
    now_s = 113.0
    assert scene.send()
    assert scene.lag.lag_s == 2.0, "since the cut, not since the commit"
    assert scene.cut()
    scene.points.break_off(DeviceError("the link is cut"))
    assert not scene.send()
    assert scene.lag.lag_s == 2.0, "of no use"
    assert scene.cut()
    assert scene.send()
    assert scene.lag.lag_s == 0


def test_the_end_gives_a_point_up_and_lets_guests_go() -> None:
    scene = PointScene(MemoryDevice(MIB))
    scene.disk.pwrite(b"x" * 4096, 0, False)
    assert scene.cut()
    scene.points.end()
    assert scene.disk.frozen is None
    assert not scene.disk.ledger.bitmaps
    scene.loop.run_once(0.0)
    assert not scene.errors
