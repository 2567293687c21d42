"""The manual pages: `man` shows them without complaint, and they say all that the parser, the
schema and the documentation have."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from manpages import DOCS, PAGES, Page, escape, manual_pages, subparsers
from support.qmpsignatures import signature
from support.waiting import WAIT_S_MAX

from nbdmirror.qmp.commands import COMMANDS

pytestmark = pytest.mark.xdist_group("manual pages")  # which are made once
COLUMNS_MAX = 300
WORD = r"[\w'-]+(?:\.\w+)*"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A page's name -> what `man` shows of it on a terminal that is wide enough for every line."""
    place = tmp_path_factory.mktemp("man")
    found = {}
    for file, text in manual_pages().items():
        path = place / Path(file).name
        path.write_text(text)
        for columns in (80, COLUMNS_MAX):  # the latter last
            found[path.stem] = as_shown(path, columns)
    return found


def as_shown(path: Path, columns: int) -> str:
    environ = {**os.environ, "MANWIDTH": str(columns), "LC_ALL": "C.UTF-8", "MANROFFOPT": "-c"}
    done = subprocess.run(
        ["man", "--warnings", "--nh", "--nj", "-E", "UTF-8", "-l", str(path)],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S_MAX,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return re.sub(".\b", "", done.stdout)


def test_man_complains_of_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "wrong.1"
    path.write_text('.TH WRONG 1\n.SH NAME\nwrong \\- is it\n.NOSUCHREQUEST "x"\n')
    with pytest.raises(AssertionError):
        as_shown(path, 80)


def section(text: str, title: str) -> str:
    """From a heading at the left edge to the next one."""
    found = re.search(rf"^{re.escape(title)}\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[1]


def test_the_names_are_what_apropos_wants(shown: dict[str, str]) -> None:
    for page in PAGES:
        line = " ".join(section(shown[page.name], "NAME").split())
        assert line == f"{page.name} - {page.purpose}"


@pytest.mark.parametrize("command", subparsers())
def test_every_option_of_a_command_has_its_entry(shown: dict[str, str], command: str) -> None:
    parser = subparsers()[command]
    text = section(shown["nbdmirror"], f"nbdmirror {command}")
    synopsis = section(shown["nbdmirror"], "SYNOPSIS")
    usage = re.search(rf"^ +nbdmirror {command}\b(.*?)(?:\n\n|\Z)", synopsis, re.M | re.S)
    assert usage, f"no synopsis of {command}"
    in_a_list = text.partition("Options: ")[2]
    for action in parser._actions:
        option = max(action.option_strings, key=len, default="")
        if option in ("", "--help"):
            continue
        entry = re.search(rf"^ +(--[a-z-]+ \w+, )?{option}\b", text, re.MULTILINE)
        assert entry or option in in_a_list, option
        if parser.usage is None:
            assert option in usage[1], option


@pytest.mark.parametrize("command", COMMANDS)
def test_every_qmp_command_has_its_signature(shown: dict[str, str], command: str) -> None:
    text = shown["nbdmirror-qmp"]
    members = COMMANDS[command].arguments.members
    if members:
        line = re.search(rf"^ +{command} ({re.escape(signature(command))})$", text, re.MULTILINE)
        wrapped = " ".join(text.split())
        assert line or f"{command} {signature(command)}" in wrapped
        for name, member in members.items():
            in_brackets = f"[{name}: " in signature(command)
            assert member.optional is in_brackets
            assert f"{name}: " in signature(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_lost(shown: dict[str, str], page: Page) -> None:
    """Code as it is typed, and every word of the rest: nothing was taken for a request or an
    escape."""
    text = (DOCS / page.source).read_text()
    lines = {line.strip() for line in shown[page.name].splitlines()}
    for line in re.findall(r"^    (.*\S)$", text, flags=re.MULTILINE):
        assert line.strip() in lines
    words = set(re.findall(WORD, shown[page.name]))
    untold = (
        r"^(#|##) .*$|^.*\n\|[-|]+\|$|\]\([^)]*\)"  # headings, titles of columns, targets of links
    )
    told = re.sub(untold, " ", text, flags=re.MULTILINE)
    for word in set(re.findall(WORD, told)):
        assert word in words or word.endswith(".md"), word


def test_what_roff_would_read_is_escaped() -> None:
    assert escape("a\\fB -x 'q' ~^`") == r"a\efB \-x \(aqq\(aq \(ti\(ha\(ga"
