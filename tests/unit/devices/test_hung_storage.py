"""A storage that hangs, or is slow to answer the simplest question, holds up nobody but whoever
waits for that storage. In-process; with real servers: tests/faults/test_hung_source.py."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from support.waiting import wait_until

from nbdmirror.devices import file as file_module
from nbdmirror.devices.async_file import FileSource
from nbdmirror.devices.base import MemoryDevice
from nbdmirror.devices.file import FileDevice
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.disk import Disk, SynchronousWrites
from nbdmirror.disk.latency import Latency
from nbdmirror.disk.tracker import Tracker
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.nbdkit_host.hangup import own_sockets
from nbdmirror.server import server as server_module
from nbdmirror.server.file_watch import FileWatch
from nbdmirror.server.server import Server
from nbdmirror.workers import Workers

WAIT_S = 10.0
GRANULE = 64 << 10
SIZE = 8 * GRANULE


class Hanging(MemoryDevice):
    """Whatever is asked of it is answered when `answers` is set."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__(size)
        self.answers = threading.Event()
        self.asked = threading.Event()

    def _wait(self) -> None:
        self.asked.set()
        assert self.answers.wait(3 * WAIT_S)

    def pread(self, buf: memoryview, offset: int) -> None:
        self._wait()
        super().pread(buf, offset)

    def pwrite(self, buf: bytes | bytearray | memoryview, offset: int, fua: bool = False) -> None:
        self._wait()
        super().pwrite(buf, offset, fua)

    def flush(self) -> None:
        self._wait()


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    device = Hanging()
    yield device
    device.answers.set()


# Threads for one storage.


def waited(hang: threading.Event) -> None:
    hang.wait(WAIT_S)


def test_a_call_that_hangs_holds_up_as_many_as_there_are_threads() -> None:
    hang, done = threading.Event(), threading.Event()
    workers = Workers("test", 2)
    workers.submit(partial(waited, hang))
    workers.submit(done.set)
    assert done.wait(WAIT_S)
    assert not workers.wait(0.0)
    hang.set()
    assert workers.wait(WAIT_S)


def test_there_are_no_more_threads_than_were_allowed_and_they_go() -> None:
    hang = threading.Event()
    workers = Workers("test-bounded", 3)
    for _ in range(50):
        workers.submit(partial(waited, hang))

    def threads() -> int:
        return sum(thread.name == "test-bounded" for thread in threading.enumerate())

    assert threads() == 3
    hang.set()
    wait_until(lambda: threads() == 0, "the threads go")
    again = threading.Event()
    workers.submit(again.set)
    assert again.wait(WAIT_S)


def test_the_last_call_comes_after_all_others() -> None:
    hang, order = threading.Event(), list[str]()
    workers = Workers("test", 4)

    def slow() -> None:
        waited(hang)
        order.append("slow")

    workers.submit(slow)
    workers.submit_last(lambda: order.append("last"))
    workers.submit(lambda: order.append("quick"))
    wait_until(lambda: order == ["quick"], "others go on")
    hang.set()
    wait_until(lambda: order == ["quick", "slow", "last"], "and then the last one")


# The loop, which all disks share.


def test_the_loop_asks_a_file_nothing_that_its_storage_may_have_to_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these waited on a network's file system, for all disks: fstat, lseek, close."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"d" * GRANULE + bytes(GRANULE) + b"d" * GRANULE)
    os.truncate(path, 1 << 20)
    loop = Loop(time.monotonic)
    source = FileSource(FileDevice.open(path), loop.call_soon)
    here, on_loop = threading.get_ident(), []

    class Watched:
        def __getattr__(self, name: str) -> object:
            call = getattr(os, name)
            is_asking = name in ("fstat", "lseek", "close", "stat", "pread", "fdatasync", "open")
            if is_asking and threading.get_ident() == here:
                on_loop.append(name)
            return call

    monkeypatch.setattr(file_module, "os", Watched())
    answered: list[object] = []
    for offset in (0, GRANULE, 2 * GRANULE, 1 << 19):
        source.start_extents(offset, (1 << 20) - offset, lambda *found: answered.append(found))
        source.start_read(memoryview(bytearray(4096)), offset, answered.append)
    while len(answered) < 8:
        loop.run_once(0.1)
    source.close()
    assert not on_loop
    assert [one for one in answered if not isinstance(one, tuple)] == [None] * 4


def test_a_file_that_was_truncated_is_found_out_all_the_same(tmp_path: Path) -> None:
    """From what is in memory alone: also once it is as long as before, and has a hole there."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"d" * (1 << 20))
    device = FileDevice.open(path)
    assert isinstance(device, FileDevice)
    device.check_whole()
    if not device.is_whole_now():
        pytest.skip("this file system has no reads from memory alone")
    os.truncate(path, 1 << 19)
    assert not device.is_whole_now()
    device.close()


def test_our_sockets_are_found_without_a_look_at_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end, and when a mirror begins, to see whether its target is this server."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file system was asked")

    for name in ("stat", "fstat", "lstat"):
        monkeypatch.setattr(os, name, refuse)
    sockets = list(own_sockets())
    monkeypatch.undo()
    for sock in sockets:
        sock.close()


def test_a_file_that_hangs_hides_no_other_ones_fate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = {}
    for number, name in enumerate(("hangs", "other")):
        (tmp_path / name).write_bytes(bytes(4096))
        device = FileDevice.open(tmp_path / name)
        assert isinstance(device, FileDevice)
        device.storage = number  # two file systems
        disks[name] = Disk(name, device)
    hang = threading.Event()
    monkeypatch.setattr(disks["hangs"].source, "change", lambda: hang.wait(WAIT_S) and "")
    events = EventRing(time.time)
    watch = FileWatch(disks, events)
    watch.start()
    (tmp_path / "other").unlink()
    wait_until(lambda: watch.changes.get("other"), "it was deleted")
    assert [event.name for event in events.pull(0)] == ["X_NBDMIRROR_SOURCE_CHANGED"]
    hang.set()
    watch.stop()


# A synchronous write whose source hangs.


def blocking_write(
    source: MemoryDevice, target: MemoryDevice
) -> tuple[SynchronousWrites, Tracker, Callable[[], DirtyBitmap | None]]:
    """The write, in a thread when it is called; the last call waits for what it returns."""
    tracker = Tracker(SIZE, GRANULE)
    writes = SynchronousWrites(
        tracker=tracker,
        target=target,
        whole_granules=False,
        on_error=lambda error: None,
        latency=Latency(),
    )
    returned: list[DirtyBitmap | None] = []
    thread = threading.Thread(
        target=lambda: returned.append(writes.pwrite(source, b"w" * 4096, GRANULE, False)),
        daemon=True,
    )
    thread.start()

    def wait() -> DirtyBitmap | None:
        thread.join(WAIT_S)
        return returned[0]

    return writes, tracker, wait


def test_a_write_whose_source_hangs_is_given_up_and_never_gets_to_the_target(
    hanging: Hanging,
) -> None:
    """The target may be somebody else's by then. The guest has its answer when the source has it,
    and marks once more, since the source is changed only then."""
    target = MemoryDevice(SIZE)
    writes, tracker, wait = blocking_write(hanging, target)
    assert hanging.asked.wait(WAIT_S)
    assert tracker.in_flight_bytes == GRANULE
    assert writes.give_up(), "nobody is at the target"
    assert tracker.in_flight_bytes == 0
    assert tracker.dirty.is_dirty(GRANULE, 1)
    tracker.dirty.clear(0, SIZE)
    hanging.answers.set()
    assert wait() is None, "its range needs a mark"
    assert not any(target.data)
    assert tracker.in_flight_bytes == 0


def test_a_write_that_is_at_the_target_is_waited_for(hanging: Hanging) -> None:
    writes, tracker, wait = blocking_write(MemoryDevice(SIZE), hanging)
    assert hanging.asked.wait(WAIT_S)
    assert not writes.give_up(), "it may change the target yet"
    assert tracker.in_flight_bytes == GRANULE
    hanging.answers.set()
    assert wait() is tracker.dirty
    assert writes.give_up() and tracker.in_flight_bytes == 0


# The end.


@pytest.mark.guarantee("It does not wait for a source that hangs")
def test_the_end_waits_for_no_storage_longer_than_for_its_share(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "END_S_MAX", 2.0)
    flushed = threading.Event()

    class Good(MemoryDevice):
        def flush(self) -> None:
            flushed.set()

    disks = {"hangs": Disk("hangs", hanging), "good": Disk("good", Good(SIZE))}
    server = Server(disks, EventRing(time.time), Loop(time.monotonic))
    server.start()
    server.end_jobs()
    began_s = time.monotonic()
    server.stop()
    assert time.monotonic() - began_s < WAIT_S
    assert flushed.wait(WAIT_S)
    assert "disk hangs: memory: does not answer" in caplog.text


def test_the_end_names_a_state_directory_that_hangs_and_not_the_disk(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk was flushed and closed: nobody says that it was not."""
    monkeypatch.setattr(server_module, "END_S_MAX", 2.0)

    class HungWriter:
        def stop(self, timeout_s: float) -> bool:
            hanging.answers.wait(3 * WAIT_S)
            return False

    server = Server(
        {"d": Disk("d", MemoryDevice(SIZE))}, EventRing(time.time), Loop(time.monotonic)
    )
    server._disk_stores = {"d": object()}  # type: ignore[dict-item]
    server.writers = {"d": HungWriter()}  # type: ignore[dict-item]
    server.stop()
    assert "disk d: the state directory does not answer: its state is not saved" in caplog.text
    assert "not flushed" not in caplog.text
