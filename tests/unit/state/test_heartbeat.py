"""Heartbeats: all disks of a server with one timer, and the files of a file system with one call,
however many disks there are. In virtual time; the last tests have a loop and threads."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.waiting import wait_until
from unit.mirror.jobdevices import StillLoop

from nbdmirror.event_loop import Loop
from nbdmirror.state import heartbeat as heartbeats
from nbdmirror.state.disk_file import ALIVE_BYTES, DiskIdentity, LastSeen
from nbdmirror.state.heartbeat import BEAT_S, IDLE_BEATS, Heartbeat, Heartbeats
from nbdmirror.state.journal import JOURNAL_BYTES, Journal, is_untouched
from nbdmirror.state.recent import RECENT_BYTES

DISKS = 100


class CountingLoop(StillLoop):
    """Counts how often it is woken, by timers and by other threads."""

    def __init__(self) -> None:
        super().__init__()
        self.wakes: list[float] = []

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Any:
        def fire() -> None:
            self.wakes.append(self.now_s)
            call()

        return super().call_later(delay_s, fire)

    def call_soon(self, call: Callable[[], None]) -> None:
        self.wakes.append(self.now_s)
        super().call_soon(call)


@dataclass
class Thread:
    """In place of Workers: runs calls at once, or holds them as a file system that hangs."""

    held: list[Callable[[], None]]
    calls: int = 0
    hangs: bool = False

    def submit(self, call: Callable[[], None]) -> None:
        self.calls += 1
        if self.hangs:
            self.held.append(call)
        else:
            call()


class BeatingDisk:
    """A disk with a file, and what is noted of it."""

    def __init__(self, path: Path, clock: Callable[[], float], *, device: int = 1) -> None:
        path.write_bytes(bytes(512))
        inode = path.stat().st_ino
        self.identity = DiskIdentity(str(path), 512, device, inode)
        self.memory = bytearray(JOURNAL_BYTES)
        self.journal = Journal(memoryview(self.memory), memoryview(bytearray(RECENT_BYTES)))
        self.alive = bytearray(ALIVE_BYTES)
        self.heartbeat: Heartbeat | None = Heartbeat(memoryview(self.alive), clock, self.journal)

    @property
    def last(self) -> LastSeen:
        last = LastSeen.from_bytes(bytes(self.alive))
        assert last is not None
        return last

    @property
    def is_seen(self) -> bool:
        """The last check covers each change, and shows whether another one came."""
        return is_untouched(bytes(self.memory))

    def change(self, times: int = 1) -> None:
        for _ in range(times):
            self.journal.end(self.journal.begin(0, 512))


class World:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        loop: Any = CountingLoop()
        self.loop = loop
        self.threads: list[Thread] = []
        self.checked: list[str] = []
        monkeypatch.setattr(heartbeats, "mtime_ns", self._mtime_ns)
        self.heartbeats = Heartbeats(self.loop, self._new_thread)
        self.disks: list[BeatingDisk] = []

    def _mtime_ns(self, source: str) -> int:
        self.checked.append(Path(source).name)
        return len(self.checked)

    def _new_thread(self) -> Any:
        self.threads.append(Thread([]))
        return self.threads[-1]

    def add(self, *, device: int = 1) -> BeatingDisk:
        path = self.folder / f"disk{len(self.disks)}"
        disk = BeatingDisk(path, self.loop.clock, device=device)
        self.disks.append(disk)
        self.heartbeats.add(disk)
        return disk

    def beat(self, times: int = 1) -> list[str]:
        """Returns which files were checked."""
        self.checked.clear()
        for _ in range(times):
            self.loop.pass_s(BEAT_S)
            assert all(disk.last.alive_s == self.loop.now_s for disk in self.disks)
        return self.checked


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def names(count: int) -> list[str]:
    return [f"disk{number}" for number in range(count)]


def test_many_disks_wake_the_process_as_often_as_one(world: World) -> None:
    """Four times a second, and the thread that checks the files every two seconds."""
    for _ in range(DISKS):
        world.add()
    world.beat(IDLE_BEATS)
    world.loop.wakes.clear()
    (thread,) = world.threads
    thread.calls = 0
    assert sorted(world.beat(10 * IDLE_BEATS)) == sorted(10 * names(DISKS))
    assert len(world.loop.wakes) == 10 * IDLE_BEATS
    assert thread.calls == 10
    assert all(disk.is_seen for disk in world.disks)


def test_after_a_change_the_next_beat_checks(world: World) -> None:
    """Whatever beat that is, and only the disk that was changed."""
    for _ in range(3):
        world.add()
    world.beat(2 * IDLE_BEATS - 1)  # the next beat checks all
    for beats in range(1, IDLE_BEATS):
        changed = world.disks[beats % 3]
        world.beat(beats)
        changed.change()
        assert not changed.is_seen
        assert world.beat() == [f"disk{beats % 3}"]
        assert changed.last.seen_s == world.loop.now_s
        assert changed.is_seen
        world.beat(2 * IDLE_BEATS - beats - 1)


def test_beside_changes_every_beat_checks(world: World) -> None:
    disk = world.add()
    for _ in range(3 * IDLE_BEATS):
        disk.change(7)
        assert world.beat() == names(1)


def test_a_change_that_goes_on_is_not_forgotten(world: World) -> None:
    disk = world.add()
    world.beat(3)
    slot = disk.journal.begin(0, 512)
    for _ in range(3 * IDLE_BEATS):
        assert world.beat() == names(1)
        assert not disk.is_seen
    disk.journal.end(slot)
    assert world.beat() == names(1)
    assert disk.is_seen


def test_a_disk_that_comes_later_is_checked_with_the_next_beat(world: World) -> None:
    world.add()
    world.beat(3)
    world.add()
    assert world.beat() == ["disk1"]
    assert world.beat(IDLE_BEATS) == names(2)


def test_a_disk_that_is_no_file_any_more_is_not_checked(world: World) -> None:
    """As after a pivot. Its server is alive all the same."""
    disk = world.add()
    world.beat(3)
    disk.identity = DiskIdentity("nbd://b/vda", 512)
    disk.change()
    assert world.beat(3 * IDLE_BEATS) == []


def test_a_disk_without_memory_has_no_heartbeat(world: World) -> None:
    without = BeatingDisk(world.folder / "without", world.loop.clock)
    without.heartbeat = None
    world.heartbeats.add(without)
    world.add()
    world.beat(IDLE_BEATS)
    assert world.beat(3 * IDLE_BEATS) == 3 * names(1)
    assert not any(without.alive)


def test_a_file_system_that_hangs_keeps_no_other_disk_waiting(world: World) -> None:
    """What is changed there is checked when the file system answers again, and once."""
    stuck, well = world.add(device=1), world.add(device=2)
    world.beat(2)
    hanging, _ = world.threads
    hanging.hangs = True
    stuck.change()
    for _ in range(2 * IDLE_BEATS):
        well.change()
        assert world.beat() == ["disk1"]
        assert well.is_seen and not stuck.is_seen
    (call,) = hanging.held
    hanging.hangs = False
    call()
    assert stuck.is_seen
    stuck.change()
    assert world.beat() == ["disk0"]
    assert stuck.is_seen


def test_on_a_real_loop_and_thread(tmp_path: Path) -> None:
    """The time of change of a file that another program writes to is noted by itself."""
    turns = itertools.count()
    loop = Loop(lambda: next(turns) * BEAT_S / 10)  # time flies
    file = tmp_path / "disk"
    disk = BeatingDisk(file, lambda: 5.0)
    loop.start()

    def is_noted() -> bool:
        return disk.last.mtime_ns == file.stat().st_mtime_ns

    try:
        loop.call_soon(lambda: Heartbeats(loop).add(disk))
        wait_until(is_noted, "a check")
        file.write_bytes(b"x" * 512)
        os.utime(file, ns=(1, 1))
        wait_until(is_noted, "another check")
        assert disk.is_seen and disk.last.alive_s == disk.last.seen_s == 5.0
    finally:
        loop.stop(5)
