"""Text of others: one line, whatever is in it."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable

import pytest
from support.seeds import SEED

from nbdmirror import logs
from nbdmirror.cli.streams import say
from nbdmirror.foreign_text import QUOTED_LENGTH_MAX, quoted, visible

LINE = "it said a\n<0>nbdmirror: b"
SHOWN = r"it said a\n<0>nbdmirror: b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("disk 1", "disk 1"),
        ("größer", "größer"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x85\u2028\udcff", r"\x85\u2028\udcff"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert visible(text) == visible(shown) == shown
    assert quoted(text) == f"'{shown}'"


def test_a_quiet_log_sees_where_it_ends() -> None:
    rng = random.Random(SEED)
    for _ in range(1000):
        text = "".join(rng.choices("'\\x\n\"a ü", k=rng.randrange(2 * QUOTED_LENGTH_MAX)))
        assert re.fullmatch(r"'[^']*'", quoted(text)) and quoted(text).isprintable()
        assert len(quoted(text)) < 5 * QUOTED_LENGTH_MAX
    assert quoted("a" * 500) == f"'{'a' * QUOTED_LENGTH_MAX}...'"


@pytest.mark.parametrize(
    "formatter", [logs._PlainFormatter, logs._JournalFormatter, logs._SyslogFormatter]
)
def test_a_line_of_the_log(formatter: type[logging.Formatter]) -> None:
    record = logging.LogRecord("nbdmirror", logging.INFO, "", 0, "it said %s", (LINE[8:],), None)
    assert formatter().format(record).endswith(SHOWN)


@pytest.mark.parametrize("tell", [say, logs.print_startup_error])
def test_a_line_on_stderr(tell: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    tell(LINE)
    assert capsys.readouterr().err.removeprefix("nbdmirror: ") == f"{SHOWN}\n"
