"""A lasting cause does not fill the log: what is said, what is counted, and that nothing else is
lost."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from nbdmirror.quiet_log import (
    CAUSES_MAX,
    LINES_MAX,
    MARK,
    PERIOD_S,
    CallbackErrors,
    Quiet,
    QuietFilter,
    Relay,
)

SAID = [True] * LINES_MAX


class Scene:
    """A Quiet whose clock stands still, and what it has told."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.told: list[tuple[int, str]] = []
        self.quiet = Quiet(lambda level, text: self.told.append((level, text)), lambda: self.now_s)

    def say(self, count: int, cause: str = "disk full") -> list[bool]:
        return [self.quiet.admits(cause, logging.ERROR, cause) for _ in range(count)]

    def pass_period(self) -> list[tuple[int, str]]:
        """What is told at its end."""
        self.now_s += PERIOD_S
        before = len(self.told)
        self.quiet.tick()
        return self.told[before:]


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.quiet.stop()


def test_the_first_and_then_a_count(scene: Scene) -> None:
    assert scene.say(1000) == [*SAID, *[False] * (1000 - LINES_MAX)]
    assert scene.pass_period() == [
        (logging.ERROR, f"disk full ({1000 - LINES_MAX} more within 10 s)")
    ]
    assert not any(scene.say(7)), "it lasts"
    assert scene.pass_period() == [(logging.ERROR, "disk full (7 more within 10 s)")]
    assert scene.pass_period() == [], "it has ended"
    scene.now_s += 1
    assert scene.say(LINES_MAX + 1) == [*SAID, False], "a new one"


def test_causes_are_told_apart(scene: Scene) -> None:
    for number in range(20):
        assert scene.say(LINES_MAX, f"job disk{number}: its target is lost") == SAID
    assert scene.say(1, "connected again") == [True]


def test_what_comes_slowly_is_said(scene: Scene) -> None:
    for _ in range(10):
        assert scene.say(1) == [True]
        scene.now_s += PERIOD_S + 1


def test_the_end_tells_what_is_left(scene: Scene) -> None:
    scene.say(LINES_MAX + 3)
    scene.quiet.stop()
    assert [text for _, text in scene.told] == ["disk full (3 more within 10 s)"]
    assert scene.pass_period() == []


def test_not_all_causes_of_the_world_are_remembered(scene: Scene) -> None:
    for number in range(2 * CAUSES_MAX):
        assert scene.say(1, f"cause {number}") == [True]
    assert len(scene.quiet._causes) == CAUSES_MAX
    scene.now_s += 2 * PERIOD_S
    assert scene.say(LINES_MAX + 1, "a new one") == [*SAID, False], "there is room again"


def test_from_many_threads_none_is_lost(scene: Scene) -> None:
    said: list[bool] = []
    threads = [threading.Thread(target=lambda: said.extend(scene.say(500))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said.count(True) == LINES_MAX
    assert scene.pass_period() == [
        (logging.ERROR, f"disk full ({4000 - LINES_MAX} more within 10 s)")
    ]


def test_without_threads_or_descriptors_everything_is_said(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full system is what the log is needed for."""

    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    before = os.fstat(2)
    monkeypatch.setattr(threading.Thread, "start", fail)
    errors = CallbackErrors(scene.quiet, Relay())
    assert [errors.text(OSError(), "full") for _ in range(20)] == ["full"] * 20
    assert os.path.samestat(os.fstat(2), before)
    monkeypatch.undo()
    assert not scene.say(1, "OSError: full")[0]
    assert "(16 more within" in scene.pass_period()[0][1]


def record(level: int, text: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("nbdmirror.x", level, "", 0, text, arguments, None)


def test_our_own_lines(scene: Scene) -> None:
    """A cause is the text, with numbers that stand alone left out; what jobs do is always said."""
    passes = QuietFilter(scene.quiet).filter
    garbage = [record(logging.WARNING, "qmp: client %d: garbage", number) for number in range(50)]
    assert [passes(one) for one in garbage].count(True) == LINES_MAX
    names = [
        record(logging.ERROR, "disk vd%d: lost: %s", number, "nbd://h:1/") for number in range(50)
    ]
    assert all(passes(one) for one in names)
    assert all(passes(record(logging.INFO, "job j: created -> running")) for _ in range(50))


RELAYED = """
import os, sys, threading
from nbdmirror.quiet_log import MARK, Relay
relay = Relay()
def say(text):
    os.write(2, text.encode())
say("before\\n")
relay.start(); relay.start()
say(f"nbdkit: error: {MARK}\\nkept"); say(" together\\n"); say(f"{MARK} is said\\n")
def shout():
    for number in range(300):
        say(f"x: {MARK}\\n")
threads = [threading.Thread(target=shout) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
say("no newline")
relay.stop(); relay.stop()
say("\\nafter\\n")
relay.start(); say("again\\n"); relay.stop()
"""


def test_only_marked_lines_are_left_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RELAYED], capture_output=True, text=True, timeout=60, check=True
    )
    expected = ["before", "kept together", f"{MARK} is said", "no newline", "after", "again"]
    assert done.stderr.splitlines() == expected
