"""FileDevice and FileSource beyond the contract: opening, the system's errors, holes, threads."""

from __future__ import annotations

import errno
import os
import queue
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.mounts import ON_DISK, loop_device, mounted

from nbdmirror.devices.aligned import AlignedDevice
from nbdmirror.devices.async_file import FileSource
from nbdmirror.devices.base import BlockDevice, Extent, MemoryDevice
from nbdmirror.devices.file import EXTENTS_MAX, FileDevice
from nbdmirror.errors import ConfigError, DeviceError

WAIT_S = 10.0


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"d" * (1 << 20))
    return path


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def read(device: BlockDevice, offset: int, length: int) -> bytes:
    buf = bytearray(length)
    device.pread(memoryview(buf), offset)
    return bytes(buf)


# Opening.


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "none.img", "does not exist"),
    "directory": (lambda folder: folder, "is a directory"),
    "fifo": (fifo, "is a special file"),
    "character device": (lambda folder: Path("/dev/null"), "is a special file"),
    "below a file": (lambda folder: Path(__file__) / "x", "cannot be opened: Not a directory"),
}


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_open_refuses_in_one_clear_line(kind: str, read_only: bool, tmp_path: Path) -> None:
    make, reason = REFUSED[kind]
    path = make(tmp_path)
    with pytest.raises(ConfigError) as caught:
        FileDevice.open(path, read_only=read_only)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(caught.value)


def test_open_says_to_use_read_only() -> None:
    """On a read-only file system: root is let in everywhere else."""
    with mounted("tmpfs", "size=1m") as folder:
        path = folder / "disk.img"
        path.write_bytes(b"x" * 512)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(ConfigError, match="is not writable: open it read-only"):
            FileDevice.open(path)
        device = FileDevice.open(path, read_only=True)
        assert read(device, 0, 512) == b"x" * 512
        device.close()


def test_open_says_where_there_is_no_direct_io() -> None:
    with mounted("ramfs") as folder:
        path = folder / "disk.img"
        path.write_bytes(b"x" * 512)
        with pytest.raises(ConfigError, match=r"no direct I/O \(O_DIRECT\)"):
            FileDevice.open(path, direct=True)


# The system's errors.


def test_a_file_truncated_underneath_is_an_error_that_says_so(disk: Path) -> None:
    device = FileDevice.open(disk)
    os.truncate(disk, 100_000)
    with pytest.raises(
        DeviceError, match="ends at 100000, not at 1048576: it was truncated"
    ) as got:
        read(device, 99_000, 4096)
    assert got.value.errno == errno.EIO
    device.close()


@pytest.mark.parametrize("length_left", [0, 100_000, 4096])
def test_what_was_truncated_is_never_told_to_be_zero(disk: Path, length_left: int) -> None:
    """A mirror would make those zeroes permanent. As data, its read fails."""
    device = FileDevice.open(disk)
    os.truncate(disk, length_left)
    assert not any(extent.zero for extent in device.extents(0, device.size))
    assert device.extents(500_000, 4096) == [Extent(4096, zero=False, hole=False)]
    device.close()


def test_a_full_file_system_is_told_as_such() -> None:
    """Short writes before it are gone on with: the first 1 MiB fits in part."""
    with mounted("tmpfs", "size=256k") as folder:
        path = folder / "disk.img"
        path.touch()
        os.truncate(path, 4 << 20)
        device = FileDevice.open(path)
        changes: list[Callable[[], None]] = [
            lambda: device.pwrite(bytes(1 << 20), 0),
            lambda: device.pwrite(bytes(1 << 20), 1 << 20, True),
            lambda: device.zero(2 << 20, 1 << 20),
        ]
        for change in changes:
            with pytest.raises(OSError) as caught:
                change()
            assert caught.value.errno == errno.ENOSPC
        device.zero(0, 4 << 20, may_trim=True)
        device.flush()
        device.close()


@pytest.mark.guarantee("A lost write is not forgotten")
def test_a_lost_write_fails_every_later_flush() -> None:
    """A loop device whose file has no room left: the page cache takes the write, write-back fails.
    Linux tells the first fdatasync only."""
    with mounted("tmpfs", "size=256k") as folder:
        path = folder / "disk.img"
        path.touch()
        os.truncate(path, 4 << 20)
        with loop_device(path) as name:
            device = FileDevice.open(name)
            device.pwrite(b"x" * (1 << 20), 0)
            for _ in range(2):
                with pytest.raises(OSError):
                    device.flush()
            device.close()


# Holes.


def test_zero_with_may_trim_and_trim_free_blocks(disk: Path) -> None:
    device = FileDevice.open(disk)
    before = allocated(disk)
    device.zero(0, 256 << 10, may_trim=True)
    assert allocated(disk) <= before - (256 << 10)
    device.trim(512 << 10, 256 << 10)
    assert allocated(disk) <= before - (512 << 10)
    device.close()


@pytest.mark.parametrize("folder", [ON_DISK, Path("/dev/shm")])
def test_zero_without_may_trim_keeps_blocks(folder: Path) -> None:
    """Both rungs: ext4 and XFS have ZERO_RANGE, tmpfs does with a hole that is filled again."""
    path = folder / f"keep-{os.getpid()}.img"
    try:
        path.write_bytes(b"d" * (1 << 20))
        device = FileDevice.open(path)
        before = allocated(path)
        device.zero(0, 1 << 20, fast=True)
        assert read(device, 0, 1 << 20) == bytes(1 << 20)
        assert allocated(path) >= before
        device.close()
    finally:
        path.unlink(missing_ok=True)


def test_extents_of_a_fragmented_file_come_in_bounded_answers(disk: Path) -> None:
    device = FileDevice.open(disk)
    for offset in range(0, 1 << 20, 8192):
        device.zero(offset, 4096, may_trim=True)
    found = device.extents(0, 1 << 20)
    assert EXTENTS_MAX <= len(found) <= EXTENTS_MAX + 1
    assert found[:2] == [Extent(4096, zero=True, hole=True), Extent(4096, zero=False, hole=False)]
    device.close()


def test_a_remembered_data_range_is_forgotten_by_a_trim(disk: Path) -> None:
    device = FileDevice.open(disk)
    assert device.extents(0, 1 << 20) == [Extent(1 << 20, zero=False, hole=False)]
    device.trim(0, 1 << 20)
    assert device.extents(0, 1 << 20) == [Extent(1 << 20, zero=True, hole=True)]
    device.close()


def test_a_block_device_trims_into_its_file(disk: Path) -> None:
    with loop_device(disk) as name:
        device = FileDevice.open(name)
        assert device.size == 1 << 20
        device.trim(1, (1 << 20) - 2)  # odd ends are left out
        device.flush()
        assert read(device, 0, 1) + read(device, (1 << 20) - 1, 1) == b"dd"
        device.zero(100, 1000, may_trim=True)
        assert read(device, 99, 1) == b"d"
        assert read(device, 100, 1000) == bytes(1000)
        device.close()
    assert allocated(disk) < 64 << 10


# O_DIRECT.


def test_a_direct_file_of_odd_size_keeps_its_size_and_its_last_bytes() -> None:
    path = ON_DISK / f"odd-{os.getpid()}.img"
    try:
        path.write_bytes(b"d" * 10_001)
        try:
            device = FileDevice.open(path, direct=True)
        except ConfigError as error:
            pytest.skip(str(error))
        assert isinstance(device, AlignedDevice)
        assert isinstance(device.inner, FileDevice) and device.inner.block_size.minimum >= 512
        device.pwrite(b"x" * 5000, 5001, True)
        device.pwrite(b"y", 10_000)
        device.flush()
        assert read(device, 4096, 5905) == path.read_bytes()[4096:]
        device.close()
        assert path.read_bytes() == b"d" * 5001 + b"x" * 4999 + b"y"
    finally:
        path.unlink(missing_ok=True)


# FileSource. The test's thread is the loop: what is posted runs where `loop_step` is called.


class Posted:
    def __init__(self) -> None:
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue()

    def call_soon(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def loop_step(self) -> None:
        self._calls.get(timeout=WAIT_S)()

    @property
    def is_empty(self) -> bool:
        return self._calls.empty()


Told = list[tuple[BaseException | None, int]]


def start(source: FileSource, buf: bytearray, offset: int) -> Told:
    """What `done` was told, and on which thread."""
    told: Told = []
    source.start_read(
        memoryview(buf), offset, lambda error: told.append((error, threading.get_ident()))
    )
    return told


class SlowStart(FileDevice):
    """A file of whose bytes the first 1,000 of each request are cached."""

    def read_now(self, buf: memoryview, offset: int) -> int:
        return super().read_now(buf[:1000], offset)


def test_a_cached_read_is_done_at_once(disk: Path) -> None:
    posted = Posted()
    source = FileSource(FileDevice.open(disk), posted.call_soon)
    buf = bytearray(4096)
    source.start_extents(0, 1, lambda found, error: None)
    posted.loop_step()  # a thread has answered
    disk.read_bytes()  # into the page cache, if it was not
    told = start(source, buf, 8192)
    assert told == [(None, threading.get_ident())]
    assert buf == b"d" * 4096
    assert posted.is_empty
    source.close()


def test_a_read_on_tmpfs_is_done_at_once() -> None:
    """tmpfs refuses RWF_NOWAIT, and never has to wait."""
    path = Path(f"/dev/shm/source-{os.getpid()}.img")
    if not path.parent.is_dir():
        pytest.skip("no /dev/shm")
    try:
        path.write_bytes(b"t" * 8192)
        source = FileSource(FileDevice.open(path), Posted().call_soon)
        buf = bytearray(4096)
        assert start(source, buf, 0) == [(None, threading.get_ident())]
        assert buf == b"t" * 4096
    finally:
        path.unlink(missing_ok=True)


def test_what_is_not_cached_is_read_by_the_pool_and_told_on_the_loop(disk: Path) -> None:
    disk.write_bytes(bytes(range(256)) * 4096)
    fd = os.open(disk, os.O_RDWR)
    posted = Posted()
    source = FileSource(SlowStart(fd, str(disk), read_only=True), posted.call_soon)
    buf = bytearray(4096)
    told = start(source, buf, 512)
    assert not told
    posted.loop_step()
    assert told == [(None, threading.get_ident())]
    assert buf == bytes(range(256)) * 16
    source.close()


def test_a_cold_file_is_read_right(tmp_path: Path) -> None:
    path = tmp_path / "cold.img"
    path.write_bytes(bytes(range(256)) * 4096)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    posted = Posted()
    source = FileSource(FileDevice.open(path), posted.call_soon)
    buf = bytearray(1 << 20)
    told = start(source, buf, 0)
    if not told:  # at once on a file system that keeps its files in memory
        posted.loop_step()
    assert told == [(None, threading.get_ident())]
    assert buf == path.read_bytes()
    source.close()


def test_any_device_is_a_source_and_is_closed_after_its_reads() -> None:
    closed = threading.Event()

    class Closable(MemoryDevice):
        def close(self) -> None:
            closed.set()

    device = Closable(1 << 20)
    device.pwrite(b"m" * (1 << 20), 0)
    posted = Posted()
    source = FileSource(device, posted.call_soon)
    buffers = [bytearray(4096) for _ in range(20)]
    told = [start(source, buf, 4096 * index) for index, buf in enumerate(buffers)]
    source.close()
    for _ in buffers:
        posted.loop_step()
    assert told == [[(None, threading.get_ident())]] * 20
    assert all(buf == b"m" * 4096 for buf in buffers)
    assert closed.wait(WAIT_S)


def test_errors_come_through_done(disk: Path) -> None:
    posted = Posted()
    device = FileDevice.open(disk)
    source = FileSource(device, posted.call_soon)
    os.truncate(disk, 0)
    told = start(source, bytearray(4096), 0)
    posted.loop_step()
    assert isinstance(told[0][0], DeviceError) and told[0][0].errno == errno.EIO
    device.close()
    told = start(source, bytearray(4096), 0)
    assert isinstance(told[0][0], DeviceError) and told[0][0].errno == errno.EBADF, "at once"
    assert str(told[0][0]) == f"{disk}: cannot be read at 0: Bad file descriptor"
    answers: list[tuple[list[Extent] | None, BaseException | None]] = []
    source.start_extents(0, 4096, lambda found, error: answers.append((found, error)))
    posted.loop_step()
    assert answers[0][0] is None and isinstance(answers[0][1], OSError)
