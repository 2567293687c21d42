"""Tests that run side by side, in the workers of pytest-xdist, and those that must run alone.

A test of the mark `alone` measures time, or needs much of the machine. Such tests come last, and
each waits until no worker runs any other test. With one worker, or without pytest-xdist, nothing of
this happens.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Generator
from typing import Any

import pytest
from support.seeds import NAME, SEED

SCATTERED = ("e2e", "model")
"""Folders of tests that compute much: few of them run at a time, and beside others, which wait."""

MESSAGE_MAX = 1500
"""Characters of a failure's message at the end of the log."""

LOCK = pytest.StashKey[Any]()
"""A file, open for the whole run: shared by tests that run side by side, held by one alone."""


def pytest_report_header() -> str:
    return f"{NAME}={SEED}"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The end of a long log says what each test has failed with: pytest cuts that to a line."""
    for report in terminalreporter.stats.get("failed", ()):
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(report.longrepr)
        terminalreporter.write_line(f"{report.nodeid}: {message[:MESSAGE_MAX]}")


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        config.stash[LOCK] = open(worker["lock"], "rb")  # noqa: SIM115 - closed by its end
    elif getattr(config.option, "numprocesses", None):
        config.stash[LOCK] = tempfile.NamedTemporaryFile(prefix="nbdmirror-tests-")  # noqa: SIM115


def pytest_unconfigure(config: pytest.Config) -> None:
    if LOCK in config.stash:
        config.stash[LOCK].close()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist's, before it starts a worker."""
    node.workerinput["lock"] = node.config.stash[LOCK].name


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None]:
    """All workers come to the same order."""
    for item in items:
        if "start" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    if LOCK in config.stash:
        items[:] = in_order(items)
    yield
    if LOCK in config.stash:
        for item in items:
            show_group(item)


def show_group(item: pytest.Item) -> None:
    """pytest-xdist keeps tests of a group together by a suffix of their names. Up to 3.8 it writes
    the suffix where pytest 9.2 does not look any more."""
    written: str = getattr(item, "_nodeid", "")
    if written.startswith(f"{item.nodeid}@"):
        made: Any = item
        made._id = type(made.id).parse(written)


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """Scattered ones among the long ones, then those of tests/unit, which are short, so that all
    workers end at about the same time; and those that run alone."""
    alone = [item for item in items if is_alone(item)]
    kinds: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not is_alone(item):
            folder = item.nodeid.partition("tests/")[2].partition("/")[0]
            kinds.setdefault(folder if folder in (*SCATTERED, "unit") else "", []).append(item)
    short = kinds.pop("unit", [])
    placed = [
        (number / len(group), kind, number, item)
        for kind, group in kinds.items()
        for number, item in enumerate(group)
    ]
    return [item for *_, item in sorted(placed, key=lambda one: one[:3])] + short + alone


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """First of all, so that no time limit runs while a test waits for its turn."""
    if LOCK not in item.config.stash:
        return (yield)
    lock = item.config.stash[LOCK]
    fcntl.flock(lock, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
    try:
        return (yield)
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)
