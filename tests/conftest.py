"""Fixtures for tests with real processes: a folder, servers that are stopped, equal images."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from fixtures import AnyServer, Identical, Start, temporary_folder
from guests import Guest
from images import Content, assert_identical
from serverprocess import Server

# What tests of one topic share, with assertions that explain themselves as those of tests do.
pytest.register_assert_rewrite(
    "badparts", "cliparts", "copierparts", "devices", "ledgerthreads", "mirrormachine", "qmpparts",
    "rulesparts", "targettrial",
)  # fmt: skip

# What nohup, or a script that has this in its background, has ignored: servers would inherit it.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler)

HAS_PASSED = pytest.StashKey[bool]()


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
    started: list[Server] = []

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
