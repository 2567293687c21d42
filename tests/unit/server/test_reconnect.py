"""A target that comes back is compared with the source, whose storage may fail meanwhile."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from functools import partial
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from nbdmirror.errors import DeviceError
from nbdmirror.event_loop import Loop
from nbdmirror.server.reconnect import reconnect

WAIT_S = 20.0


class Connection:
    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class LostTarget:
    """A target whose server answers again."""

    uri = "nbd://target"
    is_lost = True

    def __init__(self) -> None:
        self.opened: list[Connection] = []
        self.pool = SimpleNamespace(
            give_up=lambda: None, unanswered=0, reopen=self._reopen, replace=self._replace
        )

    def _reopen(self) -> Connection:
        self.opened.append(Connection())
        return self.opened[-1]

    def _replace(self, connection: Connection) -> None:
        self.is_lost = False

    def read_by(self, connection: Connection) -> Connection:
        return connection


@pytest.fixture
def loop() -> Iterator[Loop]:
    found = Loop(time.monotonic)
    found.start()
    yield found
    found.stop(WAIT_S)


def attempt(
    loop: Loop,
    target: LostTarget,
    errors: list[BaseException],
    *,
    timeout_s: float,
    is_wanted: Callable[[], bool] = lambda: True,
) -> BaseException | None:
    """How the reconnection ends if the comparison fails with `errors`, and then finds no
    difference."""
    ends: Queue[BaseException | None] = Queue()

    def difference(connection: Any) -> None:
        if errors:
            raise errors.pop(0)

    device: Any = target
    begin = partial(
        reconnect,
        device,
        loop,
        reconnect_timeout_s=timeout_s,
        is_wanted=is_wanted,
        difference=difference,
        came_back=lambda: None,
        done=ends.put,
    )
    loop.call_soon(begin)
    return ends.get(timeout=WAIT_S)


ERRORS = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EBADF, "Bad file descriptor"),
    DeviceError("nbd://source: Input/output error"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["EIO", "EBADF", "DeviceError"])
def test_a_source_that_cannot_be_read_is_tried_again(loop: Loop, error: BaseException) -> None:
    target = LostTarget()
    assert attempt(loop, target, [error], timeout_s=WAIT_S) is None
    assert [one.is_closed for one in target.opened] == [True, False]
    assert not target.is_lost


def test_a_target_with_unanswered_requests_is_not_connected_to(loop: Loop) -> None:
    """Its server may carry them out later, over newer data."""
    target = LostTarget()
    target.pool.unanswered = 2
    failure = attempt(loop, target, [], timeout_s=0)
    assert "has not answered 2 requests" in str(failure)
    assert target.is_lost and not target.opened


@pytest.mark.parametrize("error", ERRORS, ids=["EIO", "EBADF", "DeviceError"])
def test_the_error_is_told_when_the_time_is_over(loop: Loop, error: BaseException) -> None:
    target = LostTarget()
    failure = attempt(loop, target, [error], timeout_s=0)
    assert isinstance(failure, DeviceError) and str(error) in str(failure)
    assert target.is_lost and target.opened[0].is_closed


def test_a_target_that_was_away_for_long_is_found_soon(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses_s: list[float] = []
    monkeypatch.setattr("nbdmirror.server.reconnect.time", SimpleNamespace(sleep=pauses_s.append))
    target = LostTarget()
    errors: list[BaseException] = [OSError(errno.ECONNREFUSED, "Connection refused")] * 20
    assert attempt(loop, target, errors, timeout_s=3600) is None
    assert pauses_s == [0.1, 0.2, 0.4, 0.8] + [1.0] * 16


def test_a_target_that_is_not_wanted_any_more_is_left_alone(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job was cancelled between two attempts: its target may be another job's by then."""
    wanted = [True]

    def sleep(_: float) -> None:
        wanted.clear()

    monkeypatch.setattr("nbdmirror.server.reconnect.time", SimpleNamespace(sleep=sleep))
    target = LostTarget()
    failure = attempt(loop, target, [ERRORS[0]], timeout_s=WAIT_S, is_wanted=lambda: bool(wanted))
    assert isinstance(failure, DeviceError)
    assert len(target.opened) == 1, "no second attempt"
