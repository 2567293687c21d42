"""The writer of a disk's state: a write that does not end is reported, as an error is."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator

import pytest
from support.waiting import wait_until

from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.state.writer import SILENT_S, TOLD_S, Writer

WAIT_S = 10.0


class Scene:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.answers = threading.Event()
        self.asked = threading.Event()
        self.events = EventRing(lambda: 0.0)
        self.writer = Writer(Loop(lambda: self.now_s), self.events, lambda: 0.0)

    def write(self) -> None:
        self.asked.set()
        assert self.answers.wait(WAIT_S)

    @property
    def told(self) -> list[object]:
        return [event.data["reason"] for event in self.events.pull(0)]


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.answers.set()
    assert scene.writer.stop(WAIT_S)


def test_a_write_that_does_not_end(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    logging.getLogger("nbdmirror").propagate = True
    done = scene.writer.submit(scene.write)
    assert scene.asked.wait(WAIT_S)
    scene.now_s += SILENT_S - 0.1
    assert scene.writer.problem == ""
    scene.now_s += 0.2
    assert scene.writer.problem.startswith("the last write has not ended for 0:05: ")
    scene.writer.look()
    assert scene.told == [], "a busy disk's flush may take so long"
    scene.now_s += TOLD_S
    scene.writer.look()
    scene.writer.look()
    (reason,) = scene.told
    assert "0:35: the directory, or the disk, does not answer" in str(reason)
    assert caplog.text.count("state cannot be saved") == 1
    scene.answers.set()
    done.result(WAIT_S)
    wait_until(lambda: scene.writer.problem == "", "it is over")
    text = "the state directory, or the disk, answers after 0:35"
    wait_until(lambda: text in caplog.text, "the log says so")


def test_an_error_is_a_problem_until_a_write_succeeds(scene: Scene) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    scene.answers.set()
    with pytest.raises(OSError, match="No space"):
        scene.writer.submit(fail).result(WAIT_S)
    assert "No space left" in scene.writer.problem
    scene.writer.submit(scene.write).result(WAIT_S)
    wait_until(lambda: scene.writer.problem == "", "it is over")
    assert len(scene.told) == 1


def test_a_flush_of_the_disk_delays_no_write(scene: Scene) -> None:
    """Guests are held while a pivot is written down: their disk's flush may take for ever. A flush
    that does not end is reported as well."""
    flushed = scene.writer.flush(scene.write)
    assert scene.asked.wait(WAIT_S)
    for _ in range(3):
        scene.writer.submit(lambda: None).result(WAIT_S)
    scene.now_s += TOLD_S + 1.0
    scene.writer.submit(lambda: None).result(WAIT_S)
    assert "0:31: the directory, or the disk, does not answer" in scene.writer.problem
    scene.writer.look()
    assert len(scene.told) == 1
    assert not scene.writer.stop(0.0), "the end of the process waits for both"
    scene.answers.set()
    flushed.result(WAIT_S)
    wait_until(lambda: scene.writer.problem == "", "the flush counts as ended")


def test_a_spill_file_that_cannot_be_created_is_no_problem_of_the_state(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("nbdmirror").propagate = True
    scene.writer.no_spill(OSError(errno.EDQUOT, "Disk quota exceeded"))
    (reason,) = scene.told
    assert reason == (
        f"no spill file: [Errno {errno.EDQUOT}] Disk quota exceeded; "
        "what guests overwrite is kept in memory alone"
    )
    assert str(reason) in caplog.text and "state cannot be saved" not in caplog.text
    assert scene.writer.problem == ""


def test_a_flush_that_fails_is_reported(scene: Scene) -> None:
    def fails() -> None:
        raise OSError(5, "Input/output error")

    assert isinstance(scene.writer.flush(fails).exception(WAIT_S), OSError)
    assert scene.told == ["[Errno 5] Input/output error"]
