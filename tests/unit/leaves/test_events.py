"""When the readers of events hear of new ones."""

from __future__ import annotations

from collections.abc import Callable

from nbdmirror.events import EventRing


def test_readers_are_called_after_the_step_and_once() -> None:
    posted: list[Callable[[], None]] = []
    heard: list[list[str]] = []
    events = EventRing(lambda: 0.0, posted.append)
    events.subscribe(lambda: heard.append([event.name for event in events.pull(0)]))
    events.append("ONE", {})
    events.append("TWO", {})
    assert not heard, "the step has not ended"
    posted.pop()()
    assert heard == [["ONE", "TWO"]] and not posted


def test_an_event_that_comes_while_readers_are_called_is_told_too() -> None:
    posted: list[Callable[[], None]] = []
    heard: list[int] = []
    events = EventRing(lambda: 0.0, posted.append)

    def wake() -> None:
        if not heard:
            events.append("TWO", {})
        heard.append(events.next_number)

    events.subscribe(wake)
    events.append("ONE", {})
    while posted:
        posted.pop()()
    assert heard == [2, 2]


def test_without_a_loop_readers_are_called_at_once() -> None:
    heard: list[int] = []
    events = EventRing(lambda: 0.0)
    events.subscribe(lambda: heard.append(events.next_number))
    events.append("ONE", {})
    assert heard == [1]
