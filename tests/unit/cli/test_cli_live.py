"""The live view on a terminal: what it shows, and what it lives through."""

from __future__ import annotations

import asyncio
import gc
import io
import math
import os
import re
import signal
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fakes import URI, Fake
from support.images import KiB
from support.terminal import Terminal

from nbdmirror.cli import live as cli_live
from nbdmirror.cli import watch as cli_watch
from nbdmirror.cli.common import DONE
from nbdmirror.cli.disk_map import CLEAN, DIRTY, IN_FLIGHT, UNFLUSHED, ZERO, Cell, picture
from nbdmirror.cli.progress import Rates

WATCH = ["status", "--watch"]
WITHOUT_RICH = (
    "import sys; sys.modules['rich'] = None\n"
    "from nbdmirror.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def on_terminal(
    fake: Fake,
    argv: list[str],
    *,
    rows: int = 24,
    columns: int = 80,
    python: list[str] | None = None,
    **env: str,
) -> Terminal:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    whole = {**kept, "NBDMIRROR_QMP": fake.path, "TERM": "xterm-256color", **env}
    command = [sys.executable, *(python or ["-m", "nbdmirror"]), *argv]
    return Terminal(command, env=whole, rows=rows, columns=columns)


@pytest.fixture
def half(fake: Fake) -> Fake:
    """A server whose one job stays where it is, half done."""
    fake.plan["stuck"] = True
    rates = {"copy-bytes-per-s": 20, "zero-bytes-per-s": 0, "dirty-bytes-per-s": 0, "left-s": 10.0}
    fake.add_job("j", offset=200, **rates, **{"falling-behind": False})
    return fake


def test_what_it_shows(half: Fake) -> None:
    with on_terminal(half, WATCH) as terminal:
        terminal.wait_for("█]")
        half.ring.append("X_NBDMIRROR_TARGET_BACK", {"id": "j", "lost-for-s": 1.5})
        terminal.wait_for("X_NBDMIRROR_TARGET_BACK")
        assert terminal.end() == DONE
        lines = terminal.lines
        assert terminal.has_cursor
    assert lines[0] == "disk0  1 GiB  read-write  a.img"
    assert re.fullmatch("j: running ━+[╸╺]?━+ 50.0%", lines[1])
    assert re.match(
        "  200 B left, copying 20 B/s, dirtied 0 B/s, 0:10 to go, ends about ", lines[2]
    )
    assert re.search(r"\[─{37}█{37}\]", "\n".join(lines)), "as wide as the window"
    assert "█ dirty" in "\n".join(lines), "the legend"
    assert "X_NBDMIRROR_TARGET_BACK id=j lost-for-s=1.5" in lines[-1]


def test_the_same_while_a_command_waits(fake: Fake) -> None:
    """It is wiped away at the end."""
    fake.plan["stuck"] = True
    with on_terminal(fake, ["mirror", URI, "--wait", "completed"]) as terminal:
        terminal.wait_for("0.0%")
        terminal.wait_for("█" * 74)
        terminal.wait_for("█ dirty")
        fake.plan["stuck"] = False
        assert terminal.ended() == DONE
        assert terminal.lines[0].startswith("job disk0 completed; the pivot held the guest")
        assert "dirty" not in terminal.text
        assert terminal.has_cursor


@pytest.mark.parametrize("columns", [12, 20, 24, 30, 60])
def test_words_are_whole_in_a_narrow_window(half: Fake, columns: int) -> None:
    """The bar becomes shorter, and is left out."""
    with on_terminal(half, WATCH, rows=40, columns=columns) as terminal:
        terminal.wait_for("50.0%")
        assert any(line.startswith("j: running") for line in terminal.lines)
        assert "50.0%" in terminal.text and ("━" in terminal.text) is (columns >= 24)


def test_points_made_in_time_are_no_news(half: Fake) -> None:
    """There may be one each second: what happens between them stays on the screen."""
    point = {"device": "disk0", "id": "j", "time-s": 1.7e9, "bytes": 4096, "lag-s": 0.1}
    with on_terminal(half, WATCH) as terminal:
        terminal.wait_for("50.0%")
        half.ring.append("X_NBDMIRROR_RPO", {"device": "disk0", "id": "j", "kept": False})
        news: list[dict[str, Any]] = [*10 * [{}], {"name": "nightly"}, {"ack": True}]
        for number, more in enumerate(news):
            half.ring.append("X_NBDMIRROR_POINT", {**point, "sequence": number, **more})
        terminal.wait_for("sequence=11")
        assert "X_NBDMIRROR_RPO" in terminal.text and "nightly" in terminal.text
        assert "sequence=9" not in terminal.text


def test_a_window_that_changes(half: Fake) -> None:
    """Nothing is left of the old picture, and what does not fit is said."""
    with on_terminal(half, WATCH) as terminal:
        terminal.wait_for("[" + "─" * 37)
        terminal.resize(24, 30)
        terminal.wait_for("[" + "─" * 12 + "█" * 12 + "]")
        assert terminal.text.count("read-write") == 1
        terminal.resize(6, 30)
        terminal.wait_for("more lines")
        assert terminal.text.count("read-write") == 1
        terminal.resize(24, 120)
        terminal.wait_for("[" + "─" * 57 + "█" * 57 + "]")
        assert terminal.text.count("read-write") == 1
        assert terminal.end() == DONE


@pytest.mark.parametrize("size", [(1, 1), (2, 8), (3, 300)])
def test_a_window_that_is_too_small_for_anything(half: Fake, size: tuple[int, int]) -> None:
    with on_terminal(half, WATCH) as terminal:
        terminal.wait_for("dirty")
        terminal.resize(*size)
        for _ in range(2):
            half.queried.clear()
            assert half.queried.wait(10), "it asks on"
        assert terminal.end() == DONE
        assert b"Traceback" not in terminal.written


@pytest.mark.parametrize(
    ("python", "env"),
    [
        (["-m", "nbdmirror"], {"TERM": "dumb"}),
        (["-c", WITHOUT_RICH], {}),
    ],
    ids=["dumb", "without rich"],
)
@pytest.mark.parametrize("argv", [WATCH, ["mirror", URI, "--wait", "completed"]], ids=" ".join)
def test_plain_lines(fake: Fake, python: list[str], env: dict[str, Any], argv: list[str]) -> None:
    """Where no live view can be drawn."""
    with on_terminal(fake, argv, python=python, columns=200, **env) as terminal:
        if argv == WATCH:
            terminal.wait_for("a.img\ndisk0  1 GiB  read-write  a.img")
            assert terminal.end() == DONE
        else:
            assert terminal.ended() == DONE
            assert "disk0: running" in terminal.text
        assert b"\x1b" not in terminal.written


def test_without_colours_and_without_unicode(half: Fake) -> None:
    with on_terminal(half, WATCH, NO_COLOR="1", PYTHONIOENCODING="ascii") as terminal:
        terminal.wait_for("[" + "-" * 37 + "#" * 37 + "]")
        assert terminal.colors == {"default"}
        assert terminal.end() == DONE
        assert terminal.written.isascii()


def test_a_server_that_goes_and_comes(half: Fake) -> None:
    with on_terminal(half, WATCH) as terminal:
        terminal.wait_for("a.img")
        half.server.stop()
        terminal.wait_for("trying again")
        assert "disk0  1 GiB" in terminal.text, "the last that was known"
        again = Fake(half.path)
        again.source = "b.img"
        again.server.start()
        try:
            terminal.wait_for("b.img")
            assert "trying again" not in terminal.text and "a.img" not in terminal.text
            assert terminal.end() == DONE
        finally:
            again.server.stop()


def test_no_server_from_the_start(fake: Fake) -> None:
    fake.server.stop()
    with on_terminal(fake, WATCH) as terminal:
        assert terminal.ended() == 3
        assert "no server at" in terminal.text


def test_a_signal_that_ends_it_leaves_the_terminal_as_it_was(half: Fake) -> None:
    with on_terminal(half, WATCH) as terminal:
        terminal.wait_for("dirty")
        assert not terminal.has_cursor
        assert terminal.end(signal.SIGTERM) == -signal.SIGTERM
        assert terminal.has_cursor


def test_names_that_are_commands_to_a_terminal(half: Fake) -> None:
    half.source = "\x1b]0;title\x07\x1b[2J\udce4\n.img"
    with on_terminal(half, WATCH) as terminal:
        terminal.wait_for(r"\x1b]0;title\x07\x1b[2J\udce4\n.img")
        assert terminal.end() == DONE


# Without a terminal


class Silent:
    """A session whose server does not answer until it is told to."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()

    async def status(self) -> dict[str, Any]:
        await self.may_answer.wait()
        return {"disks": []}


class Seen:
    map_cells = 1

    def __init__(self, session: Silent) -> None:
        self.troubles: list[str] = []
        self._session = session

    def heard(self, event: object) -> None: ...

    def show(self, status: object, maps: object, trouble: str = "") -> None:
        self.troubles.append(trouble)
        self._session.may_answer.set()


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said meanwhile, with the age of what is shown."""
    monkeypatch.setattr(cli_watch, "SILENT_S", 0.0)

    async def ask() -> list[str]:
        session = Silent()
        seen = Seen(session)
        await cli_watch._Live(seen, "")._ask(session)  # type: ignore[arg-type]
        return seen.troubles

    (trouble,) = asyncio.run(ask())
    assert "does not answer; this was the status 0:01 ago" in trouble


class Nowhere(io.TextIOWrapper):
    def write(self, text: str) -> int:
        return len(text)


@pytest.mark.slow
def test_weeks_in_constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs and events come and go, and each status is new."""
    cells, draws = 20, 100
    nothing = [0] * cells
    monkeypatch.setattr(sys, "stdout", Nowhere(io.BytesIO(), encoding="utf-8"))

    def draw(view: cli_live.HostView, first: int) -> None:
        for number in range(first, first + draws):
            name = f"job{number}"
            job = {"device": name, "offset": number, "len": 10_000, "status": "running"}
            dirty = [number % (100 + cell) for cell in range(cells)]
            maps = {"lengths": [200] * cells, "dirty": dirty, "in-flight": nothing}
            for _ in range(100):
                view.heard({"event": f"EVENT_{number}", "data": {"device": name}})
            disk = {"name": "vda", "size": number, "jobs": [job]}
            view.show({"disks": [disk]}, {name: {**maps, "unflushed": nothing, "zero": nothing}})

    tracemalloc.start()
    try:
        with cli_live.HostView() as view:
            draw(view, 0)
            draw(view, draws)
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            draw(view, 2 * draws)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
            assert list(view._meters) == [f"job{3 * draws - 1}"]
    finally:
        tracemalloc.stop()
    assert after - before < 512 * KiB, "the events alone are some MiB"


# Maps


def of_one_cell(**kinds: int) -> dict[str, list[int]]:
    numbers = {"lengths": 100, "dirty": 0, "in-flight": 0, "unflushed": 0, "zero": 0}
    return {key: [number] for key, number in {**numbers, **kinds}.items()}


@pytest.mark.parametrize(
    ("kinds", "cell"),
    [
        ({}, Cell(CLEAN, 0)),
        ({"dirty": 25}, Cell(DIRTY, 0.25)),
        ({"dirty": 90, "in-flight": 20, "unflushed": 20}, Cell(IN_FLIGHT, 1)),
        ({"unflushed": 1, "zero": 99}, Cell(UNFLUSHED, 0)),
        ({"zero": 50}, Cell(ZERO, 0)),
        ({"zero": 49}, Cell(CLEAN, 0)),
    ],
)
def test_kinds_of_cells(kinds: dict[str, int], cell: Cell) -> None:
    found = picture(of_one_cell(**kinds))
    assert found is not None and found.cells == [cell]


def test_a_map_in_words() -> None:
    found = picture(of_one_cell(dirty=25, zero=50))
    assert found is not None
    assert found.text == "100 B: 0 B in flight, 25 B dirty, 0 B not flushed, 50 B zeroes"


ODD: list[Any] = [None, True, 1, 1.5, "", "text", {}, [None], [True], [1.5], ["1"], [[1]], [{}]]


@given(
    answer=st.dictionaries(
        st.sampled_from(["lengths", "dirty", "in-flight", "unflushed", "zero"]),
        st.lists(st.integers(-10, 300), max_size=3) | st.sampled_from(ODD),
    )
)
def test_answers_that_are_no_maps(answer: dict[str, Any]) -> None:
    found = picture(answer)
    if found is not None:
        assert all(0 <= cell.share <= 1 for cell in found.cells)


def test_the_predicted_end() -> None:
    noon = 1_700_000_000.0
    assert Rates(1, 0, 0, None).end(noon, is_following=False) == ""
    assert Rates(1, 0, 0, 10.0).end(noon, is_following=True) == ""
    for never in (1e12, 1e300, math.inf, math.nan, -1.0):
        assert Rates(1, 0, 0, never).end(noon, is_following=False) == ""
    assert re.fullmatch(r"about \d\d:\d\d:\d\d", Rates(1, 0, 0, 10.0).end(noon, is_following=False))
    found = Rates(1, 0, 0, 2 * 86400.0, has_zeroes=True).end(noon, is_following=False)
    assert re.fullmatch(r"about 2023-11-1\d \d\d:\d\d:\d\d or sooner", found)
