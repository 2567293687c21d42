"""When threads start: now, later, or never. tests/integration/test_no_threads.py has the rest."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from nbdmirror.threads import Starter

WAIT_S = 10.0


def test_a_thread_runs_at_once() -> None:
    ran = threading.Event()
    assert Starter().start(ran.set, "nbdmirror-test")
    assert ran.wait(WAIT_S)


def test_when_the_process_ends_no_thread_starts() -> None:
    starter, ran = Starter(), threading.Event()
    starter.end()
    assert not starter.start(ran.set, "nbdmirror-test")
    with pytest.raises(RuntimeError, match="the process ends"):
        starter.start_now(ran.set, "nbdmirror-test")
    assert not ran.is_set()


def test_the_end_waits_for_a_thread_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    starter, may_start, is_starting = Starter(), threading.Event(), threading.Event()
    start = threading.Thread.start

    def slowly(thread: Any) -> None:
        if thread.name == "slow":
            is_starting.set()
            assert may_start.wait(WAIT_S)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    first = threading.Thread(target=lambda: starter.start(lambda: None, "slow"))
    last = threading.Thread(target=starter.end)
    first.start()
    assert is_starting.wait(WAIT_S)
    last.start()
    last.join(0.05)
    assert last.is_alive(), "a thread is starting"
    may_start.set()
    last.join(WAIT_S)
    first.join(WAIT_S)
    assert not last.is_alive()
