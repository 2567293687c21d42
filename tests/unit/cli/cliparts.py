"""What the tests of the command line have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
from support.fakes import Fake

WAIT_S_MAX = 20.0
AnyFake = TypeVar("AnyFake", bound=Fake)
Main = Callable[..., tuple[int, str, str]]


@contextmanager
def reached(fake: AnyFake, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnyFake]:
    """`fake` is the server that commands find."""
    monkeypatch.setenv("NBDMIRROR_QMP", fake.path)
    fake.server.start()
    yield fake
    fake.server.stop()


def one_line(err: str) -> str:
    assert err.startswith("nbdmirror: ")
    assert err.count("\n") == 1
    return err
