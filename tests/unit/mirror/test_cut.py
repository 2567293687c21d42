"""Cut: guests are held for a bound, flushes are not held, and several disks are cut at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from unit.disk.ledgerthreads import running, wait

from nbdmirror.disk.ledger import Ledger
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.cut import CUT_LIMIT_S, Cut


class Scene:
    """Disks without content, and a loop whose clock is moved by hand."""

    def __init__(self, disks: int = 1) -> None:
        self.now_s = 0.0
        self.loop = Loop(lambda: self.now_s)
        self.ledgers = [Ledger() for _ in range(disks)]
        self.told: list[tuple[str, float]] = []
        self.idle_at_take: list[bool] = []
        self.cut = Cut(
            self.ledgers,
            loop=self.loop,
            take=self.take,
            on_taken=lambda held_s: self.told.append(("taken", held_s)),
            on_late=lambda held_s: self.told.append(("late", held_s)),
        )

    def take(self) -> None:
        self.idle_at_take += [ledger.is_idle for ledger in self.ledgers]
        assert all(ledger.gate is not None for ledger in self.ledgers)

    def turn(self, elapsed_s: float = 0.0) -> None:
        self.now_s += elapsed_s
        self.loop.run_once(0.0)

    @property
    def is_open(self) -> bool:
        return all(ledger.gate is None for ledger in self.ledgers)


def test_an_idle_disk_is_cut_at_once() -> None:
    scene = Scene()
    scene.cut.start()
    assert scene.told == [("taken", 0.0)]
    assert scene.is_open
    scene.turn(1.0)
    assert len(scene.told) == 1


def test_a_cut_waits_for_the_write_in_progress() -> None:
    scene = Scene()
    token = scene.ledgers[0].enter()
    scene.cut.start()
    scene.turn(0.01)
    assert not scene.told
    scene.ledgers[0].leave(token, 0, 0)
    scene.turn()
    assert [(what, round(held_s, 6)) for what, held_s in scene.told] == [("taken", 0.01)]
    assert scene.is_open


def test_a_write_that_takes_too_long_makes_the_cut_late() -> None:
    scene = Scene()
    token = scene.ledgers[0].enter()
    scene.cut.start()
    scene.turn(CUT_LIMIT_S)
    assert scene.told == [("late", CUT_LIMIT_S)]
    assert scene.is_open
    scene.ledgers[0].leave(token, 0, 0)
    scene.turn()
    assert not scene.idle_at_take, "nothing is taken afterwards"


def test_several_disks_are_cut_when_all_are_idle() -> None:
    scene = Scene(disks=3)
    tokens = [ledger.enter() for ledger in scene.ledgers]
    scene.cut.start()
    for ledger, token in zip(scene.ledgers, tokens, strict=True):
        assert not scene.told
        ledger.leave(token, 0, 0)
        scene.turn()
    assert scene.idle_at_take == [True] * 3
    assert scene.is_open


def test_an_attempt_can_be_abandoned() -> None:
    scene = Scene()
    token = scene.ledgers[0].enter()
    scene.cut.start()
    scene.cut.abandon()
    assert scene.is_open
    scene.ledgers[0].leave(token, 0, 0)
    scene.turn(1.0)
    assert not scene.told
    scene.cut.abandon()


def test_guests_that_were_held_continue_and_are_not_held_twice() -> None:
    """With real threads, and a loop that runs in its thread."""
    loop = Loop(time.monotonic)
    loop.start()
    ledger = Ledger()
    taken, held = threading.Event(), threading.Event()
    through: list[int] = []
    inside = ledger.enter()

    def start() -> None:
        def no(_: float) -> Any:
            raise AssertionError("late")

        Cut(
            [ledger], loop=loop, take=taken.set, on_taken=lambda _: None, on_late=no, limit_s=20.0
        ).start()
        held.set()

    def guest(number: int) -> Callable[[], None]:
        def write() -> None:
            token = ledger.enter()
            through.append(number)
            ledger.leave(token, 0, 0)

        return write

    loop.call_soon(start)
    wait(held)
    with running(*(guest(number) for number in range(4))):
        assert not through
        ledger.leave(inside, 0, 0)
        wait(taken)
    assert sorted(through) == [0, 1, 2, 3]
    loop.stop(20.0)
