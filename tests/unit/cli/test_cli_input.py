"""What would mean nothing, or something else than was meant, is refused by the command line before
it connects, in one line."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Sequence

import pytest
from unit.cli.cliparts import Main, one_line

from nbdmirror.cli import common, values
from nbdmirror.cli import main as cli


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1.5",
        "1.3K",
        "10MB",
        "1B",
        "5iB",
        "K",
        "-1",
        "+1",
        "1e3",
        "1,5G",
        " 1",
        "1 M",
        "٣",
        "0x10",
    ],
)
def test_sizes_that_may_mean_something_else(run: Main, text: str) -> None:
    for arguments in (("set-speed", "--", text), ("mirror", "nbd://h", f"--speed={text}")):
        status, _, err = run(*arguments)
        assert status == common.USAGE
        one_line(err)


def test_a_rate_that_nobody_means_gets_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, words in (("100", "100 means 100 bytes per second"), ("64K", ""), ("0", "")):
        assert cli.build_parser().parse_args(["set-speed", text]).rate == values.parse_size(text)
        assert words in (err := capsys.readouterr().err)
        assert bool(err) == bool(words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mirror", "nbd://h", "--timeout", "5"), "--timeout: needs --wait"),
        (("mirror", "nbd://h", "--json"), "--json: needs --wait"),
        (("mirror", "nbd://h", "--device", ""), "device: is empty"),
        (("mirror", "nbd://h", "--job", ""), "job: is empty"),
        (("cancel", "--device", ""), "device: is empty"),
        (("wait", "--ready", "--job", ""), "job: is empty"),
        (("handover", "nbd://h", "--qemu", "q", "--to", "unix:"), "is not an address"),
        (("handover", "nbd://h", "--qemu", "q", "--to", "tcp:h:99999"), "from 1 to 65535"),
        (("handover", "nbd://h", "--qemu", "", "--to", "tcp:h:1"), "qemu: is empty"),
        (("serve", "a.img", "--socket", ""), "socket: is empty"),
        (("serve", "a.img", "--tls-certificates", ""), "tls-certificates: is empty"),
        (("serve", "a.img", "--state-dir="), "state-dir: is empty"),
        (("serve", "a.img", ""), "DISK: is empty"),
        (("serve", "a\nb.img"), "DISK: 'a\\nb.img' has control characters"),
        (("serve", "vda=d\udcff.img"), "is not UTF-8; use a symbolic link to the file"),
        (("serve", "a.img", "--state-dir", "a\x1b"), "state-dir: 'a\\x1b' has control"),
        (("serve", "a.img", "--port", "1_0"), "is not a whole number"),
        (("serve", "a.img", "--threads", " 4"), "is not a whole number"),
        (("status", "--qmp", ""), "qmp: is empty"),
        (("mirror", ""), "TARGET_URI: is empty"),
        (("mirror", "nbd://h", "--reconnect-delay", "1.5"), "is not a whole number"),
        (("wait", "--ready", "--timeout", "1_0"), "is not a number of seconds"),
    ],
)
def test_what_would_mean_nothing(run: Main, arguments: tuple[str, ...], words: str) -> None:
    status, _, err = run(*arguments)
    assert (status, words in one_line(err)) == (common.USAGE, True)


def _actions() -> list[tuple[str, argparse.Action]]:
    """All arguments, each with its command."""
    commands = next(a for a in cli.build_parser()._actions if isinstance(a.choices, dict))
    assert isinstance(commands.choices, dict)
    return [(name, one) for name, parser in commands.choices.items() for one in parser._actions]


def _numeric_options() -> list[tuple[str, str]]:
    """(command, option) of each option whose value is a number, a size or a rate."""
    return [
        (name, action.option_strings[0])
        for name, action in _actions()
        if action.metavar in ("N", "S", "SIZE", "RATE") and action.option_strings
    ]


@pytest.mark.parametrize(("command", "option"), _numeric_options())
@pytest.mark.parametrize("value", ["-1", "x", "nan", "1e3", "9" * 25])
def test_a_refused_number_says_what_is_allowed(
    run: Main, command: str, option: str, value: str
) -> None:
    first = "add" if command == "bitmap" else "nbd://h"
    status, _, err = run(command, first, f"{option}={value}")
    assert status == common.USAGE
    assert f"argument {option}: {value!r} is" in one_line(err)
    assert re.search(r"from \d+ to \d+|0 or more|examples: |more than 8 EiB", err)


SEVERAL = {
    ("serve", "--accept-old-side"),
    ("mirror", "--journal"),
    *itertools.product(("recover",), ("--image", "--journal")),
    *itertools.product(("wait", "complete", "cancel"), ("--device", "--job")),
}


@pytest.mark.parametrize(
    ("command", "option", "choices"),
    [
        (name, action.option_strings[-1], action.choices)
        for name, action in _actions()
        if action.option_strings and action.nargs is None
    ],
)
def test_an_option_that_is_given_twice(
    run: Main, command: str, option: str, choices: Sequence[str] | None
) -> None:
    """Neither of the two is dropped."""
    value = {"--to": "tcp:h:1", "--listen": "h:1"}.get(option, choices[0] if choices else "1")
    status, _, err = run(command, option, value, f"{option}={value}", "--unknown")
    assert status == common.USAGE
    is_refused = f"argument {option}: is given twice" in err
    assert is_refused is ((command, option) not in SEVERAL), err


@pytest.mark.parametrize("target", ["t.img", "nbd://h:99999/", "nbd+unix:///?sokcet=/s"])
def test_a_target_is_looked_at_before_anything_else(run: Main, target: str) -> None:
    for arguments in (("mirror", target), ("handover", target, "--qemu", "q", "--to", "tcp:h:1")):
        status, _, err = run(*arguments)
        assert (status, target in one_line(err)) == (common.FAILED, True)


def test_where_a_guest_goes_is_named_from_here() -> None:
    parse = cli.build_parser().parse_args
    for text, to in (("unix:s", f"unix:{os.getcwd()}/s"), ("tcp:h:1", "tcp:h:1")):
        assert parse(["handover", "nbd://h", "--qemu", "q", "--to", text]).to == to
