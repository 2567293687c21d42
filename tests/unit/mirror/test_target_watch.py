"""TargetWatch: a target that hangs is found, and one that is slow is left to its work."""

from __future__ import annotations

import logging
import os
import queue
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.clients import requested
from support.fixtures import Start
from support.processes import freeze
from support.servers import NbdkitTarget, QemuNbd
from support.waiting import wait_until
from unit.mirror.copierparts import MIB, Clock, Devices, a_copier, data

from nbdmirror.mirror.target_watch import FLUSH_TAKES_S, HUNG_S, TargetWatch
from nbdmirror.nbdclient import pool
from nbdmirror.nbdclient.device import NbdDevice

WAIT_S = 10.0


class Silent:
    """A target that answers nothing; what is known of its server is `is_there`."""

    description = "nbd://silent"

    def __init__(self) -> None:
        self.is_there = False
        self.asked = 0
        self.given_up = 0

    def is_server_there(self) -> bool:
        self.asked += 1
        return self.is_there

    def give_up(self) -> None:
        self.given_up += 1


class World:
    """A copier with a write in flight, and the watch over its target."""

    def __init__(self, *, reconnect_delay_s: float = 30.0) -> None:
        self.clock = Clock()
        self.posted: queue.Queue[Callable[[], None]] = queue.Queue()
        self.call_soon = self.posted.put
        self.devices = Devices(data(8 * MIB), keeps=("write", "flush"))
        self.copier, tracker, _ = a_copier(self.devices, clock=self.clock)
        self.target = Silent()
        loop: Any = self
        target: Any = self.target
        self.watch = TargetWatch(
            copier=self.copier,
            tracker=tracker,
            target=target,
            on_flush_error=lambda error: None,
            loop=loop,
            reconnect_delay_s=reconnect_delay_s,
        )
        self.copier.start()
        self.watch.look(may_flush=True)

    def pass_time(self, seconds: float) -> None:
        """Looks each second. An answer about the server comes at once."""
        for _ in range(int(seconds)):
            asked = self.target.asked
            self.clock.advance(1.0)
            self.watch.look(may_flush=True)
            if self.watch._is_asking:
                self.posted.get(timeout=WAIT_S)()
                assert self.target.asked == asked + 1

    def answer(self) -> None:
        self.devices.kept.pop(0)()


def test_a_target_that_is_gone_is_found() -> None:
    world = World()
    world.pass_time(HUNG_S)
    assert world.target.given_up == 0
    world.pass_time(2)
    assert world.target.given_up == 1


def test_a_target_whose_server_is_there_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """Its storage is slow, or hangs: another connection would not help. And that is said."""
    world = World()
    world.target.is_there = True
    with caplog.at_level(logging.WARNING):
        world.pass_time(20 * HUNG_S)
    assert world.target.given_up == 0
    assert 10 <= world.target.asked <= 20
    assert "nbd://silent: has answered no request for 61 s; its server is alive" in caplog.text
    world.target.is_there = False
    world.pass_time(HUNG_S + 2)
    assert world.target.given_up == 1


def test_any_answer_counts() -> None:
    world = World()
    for _ in range(5):
        world.pass_time(HUNG_S - 5)
        world.answer()
    assert not world.target.asked


def test_without_a_reconnect_delay_it_is_waited_for_for_ever() -> None:
    world = World(reconnect_delay_s=0.0)
    world.pass_time(10 * HUNG_S)
    assert not world.target.asked and not world.target.given_up


def test_each_time_in_vain_is_a_longer_patience() -> None:
    """A server that is full cannot be asked. It must not be cut off again and again at the same
    place; once its flush is through, what its answers took is what counts."""
    world = World()
    for count in range(4):
        world.pass_time(HUNG_S * 2**count + 1)
        assert world.target.given_up == count + 1
    world.pass_time(HUNG_S * 10)
    while world.devices.kept:
        world.answer()
        world.watch.look(may_flush=True)
    assert world.target.given_up == 4
    world.copier.tracker.dirty.mark(0, 1)
    world.copier.pump()
    world.pass_time(HUNG_S * 15)
    assert world.target.given_up == 4


def test_a_flush_that_takes_long_comes_after_less_the_next_time() -> None:
    """A target with much memory and a slow disk: nothing else may be answered meanwhile."""
    world = World()
    took_s: list[float] = []
    for count in range(8):
        while len(world.devices.of("flush")) == count:
            world.copier.written_bytes += 40 * MIB
            world.clock.advance(0.1)
            world.watch.look(may_flush=True)
        took_s.append(world.watch._covered_bytes / (50 * MIB) - sum(took_s))
        world.clock.advance(took_s[-1])
        world.devices.kept.pop()()
        world.copier.tracker.unflushed.mark(0, 1)
    assert took_s[0] > 30, "ten seconds at full speed"
    assert max(took_s[1:]) < 3 * FLUSH_TAKES_S


def test_a_server_whose_storage_takes_its_time_is_there_meanwhile(
    start: Start, folder: Path
) -> None:
    script = folder / "slow.sh"
    script.write_text(
        "#!/bin/sh\ncase $1 in get_size) echo 1M;; thread_model) echo parallel;; "
        f"pread) touch {folder}/reads; while [ ! -e {folder}/go ]; do sleep 0.05; done; "
        "head -c $3 /dev/zero;; *) exit 2;; esac\n"
    )
    script.chmod(0o755)
    target = start(NbdkitTarget(folder, "sh", str(script)))
    device = NbdDevice.open(target.uri())
    read = requested(target.uri(), lambda guest: guest.pread(512, 0))
    wait_until((folder / "reads").exists, "a read is under way")
    assert device.is_server_there()
    (folder / "go").touch()
    read.result()
    device.close()


def test_a_server_that_is_stopped_is_not_there(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "t.img").write_bytes(bytes(MIB))
    target = start(QemuNbd(folder, folder / "t.img"))
    device = NbdDevice.open(target.uri())
    assert device.is_server_there()
    monkeypatch.setattr(pool, "LIFE_S", 0.5)
    freeze(target.pid)
    began_s = time.monotonic()
    assert not device.is_server_there()
    assert time.monotonic() - began_s < WAIT_S
    os.kill(target.pid, signal.SIGCONT)
    device.close()
