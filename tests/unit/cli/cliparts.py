"""What the tests of the command line have in common."""

from __future__ import annotations

from collections.abc import Callable

WAIT_S_MAX = 20.0
Main = Callable[..., tuple[int, str, str]]


def one_line(err: str) -> str:
    assert err.startswith("nbdmirror: ")
    assert err.count("\n") == 1
    return err
