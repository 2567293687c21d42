"""Fixtures for tests with real processes: a folder, servers that are stopped, equal images."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Protocol, Self, TypeVar

import pytest
from support.guests import Guest
from support.images import Content, assert_identical
from support.kept import MEMORIES


class Startable(Protocol):
    """A Server, or what is started and stopped like one."""

    layer: int

    def start(self) -> Self: ...
    def stop(self) -> None: ...
    def abandon(self) -> None: ...


AnyServer = TypeVar("AnyServer", bound=Startable)
Identical = Callable[[Content | Guest, Content | Guest], None]


class Start(Protocol):
    """The fixture `start`."""

    def __call__(self, server: AnyServer, /) -> AnyServer: ...


MEMORY = Path("/dev/shm")
HAS_PASSED = pytest.StashKey[bool]()


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """For images and sockets: in memory where there is such a place, and with a short name, since
    a Unix socket's may have 107 bytes."""
    place = MEMORY if os.access(MEMORY, os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="nbdmirror-", dir=place))
    try:
        yield path
    finally:
        for definition in path.rglob("*.json"):  # of servers with state that were killed
            if match := re.search(
                r'"memory": "(/dev/shm/nbdmirror-state-\w+)"', definition.read_text()
            ):
                shutil.rmtree(match[1], ignore_errors=True)
        for notes in path.rglob(MEMORIES):  # of others that were killed
            for memory in set(notes.read_text().split()):
                shutil.rmtree(memory, ignore_errors=True)
        shutil.rmtree(path)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A `temporary_folder`."""
    with temporary_folder() as path:
        yield path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember whether the test itself has passed, for the fixtures' ends."""
    report = yield
    if report.when == "call":
        item.stash[HAS_PASSED] = report.passed
    return report


@pytest.fixture
def start(folder: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """start(server): it is running when this returns, and is stopped, and checked, after the test:
    first guests, then the servers under test, then what these were connected to."""
    started: list[Startable] = []

    def begin(server: AnyServer) -> AnyServer:
        started.append(server.start())
        return server

    yield begin
    has_passed = request.node.stash.get(HAS_PASSED, False)
    with contextlib.ExitStack() as stack:  # the last one that it is told of goes first
        for server in sorted(started, key=lambda server: server.layer):
            stack.callback(server.stop if has_passed else server.abandon)


@pytest.fixture
def identical(start: Start, request: pytest.FixtureRequest) -> Iterator[Identical]:
    """identical(source, target): compared after the test, while its servers still run. A test that
    uses this fixture and names no pair has forgotten the point of it, and fails."""
    pairs: list[tuple[Content | Guest, Content | Guest]] = []
    yield lambda source, target: pairs.append((source, target))
    if not request.node.stash.get(HAS_PASSED, False):
        return
    assert pairs, "a mirror test tells what must be identical at its end"
    for source, target in pairs:
        assert_identical(_content(source), _content(target))


def _content(thing: Content | Guest) -> Content:
    return thing.stop().model if isinstance(thing, Guest) else thing
