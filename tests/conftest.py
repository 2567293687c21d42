"""Fixtures for tests with real processes; what they are made of is in tools.py."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from tools import Content, Guest, Server, assert_identical

AnyServer = TypeVar("AnyServer", bound=Server)
Start = Callable[[AnyServer], AnyServer]
Identical = Callable[[Content | Guest, Content | Guest], None]

MEMORY = Path("/dev/shm")


@pytest.fixture
def folder() -> Iterator[Path]:
    """For images and sockets: in memory where there is such a place, and with a short name, since
    a Unix socket's may have 107 bytes."""
    place = MEMORY if os.access(MEMORY, os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="nbdmirror-", dir=place))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """start(server): it is running when this returns, and is stopped, and checked, after the
    test."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


@pytest.fixture
def identical(start: Start) -> Iterator[Identical]:
    """identical(source, target): compared after the test, while its servers still run. A test that
    uses this fixture and names no pair has forgotten the point of it, and fails."""
    pairs: list[tuple[Content | Guest, Content | Guest]] = []
    yield lambda source, target: pairs.append((source, target))
    assert pairs, "a mirror test tells what must be identical at its end"
    for source, target in pairs:
        assert_identical(_content(source), _content(target))


def _content(thing: Content | Guest) -> Content:
    return thing.stop().model if isinstance(thing, Guest) else thing
