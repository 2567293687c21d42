"""Guests' requests that wait for a storage that hangs are told, though nothing is noted of them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.disk.disk import Disk
from nbdmirror.server.waiting import TOLD_S, WAITS_S, Waiting


class Scene:
    def __init__(self) -> None:
        self.now_s = 100.0
        loop: Any = SimpleNamespace(clock=lambda: self.now_s)
        self.disk = Disk("vda", MemoryDevice(4096))
        self.waiting = Waiting(loop, [self.disk])

    def problem(self) -> str:
        return self.waiting.problem(self.disk)

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.waiting.look()


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_request_that_waits(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    ledger = scene.disk.ledger
    token = ledger.enter_read()
    assert not scene.problem(), "not looked at yet"
    scene.pass_time(1)
    assert not scene.problem()
    scene.pass_time(WAITS_S)
    assert scene.problem() == "a guest's request has waited for memory for 0:05"
    assert not caplog.records
    for _ in range(3):
        scene.pass_time(TOLD_S)
    assert [record.getMessage() for record in caplog.records] == [
        "disk vda: a guest's request has waited for memory for 0:35"
    ]
    ledger.leave_read(token)
    assert not scene.problem(), "answered, and not looked at yet"
    scene.pass_time(1)
    assert "answered again" in caplog.records[-1].getMessage()
    scene.pass_time(TOLD_S)
    assert not scene.problem()


def test_requests_that_come_and_go(scene: Scene) -> None:
    """There is always one in progress, and none waits."""
    ledger = scene.disk.ledger
    token = ledger.enter()
    for _ in range(20):
        scene.pass_time(WAITS_S)
        following = ledger.enter()
        ledger.leave(token, 0, 512)
        token = following
        assert not scene.problem()


def test_requests_that_a_pivot_holds(scene: Scene) -> None:
    """Those are no storage's."""
    scene.disk.ledger.close_gate(lambda: None)
    gate = scene.disk.ledger.gate
    assert gate is not None
    gate.waiting.add(next(scene.disk.ledger.tokens))
    for _ in range(4):
        scene.pass_time(WAITS_S)
        assert not scene.problem()


def test_a_synchronous_write(scene: Scene) -> None:
    """Which of the two sides it waits for is not known; a read waits for the source."""
    scene.disk.synchronous = SimpleNamespace()  # type: ignore[assignment]
    scene.disk.ledger.enter()
    scene.pass_time(0)
    scene.pass_time(WAITS_S)
    assert "waited for its mirror's target, or memory for" in scene.problem()
    scene.disk.ledger.enter_read()
    assert "waited for memory for" in scene.problem()
