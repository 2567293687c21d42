"""Shell completion, in the shells that it is for."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
from pathlib import Path

import pytest
from completions import PLACES, completions
from support.processes import ROOT, run
from support.waiting import WAIT_S_MAX, wait_until

CASES = {
    "nbdmirror mirr": {"mirror"},
    "nbdmirror ca": {"cancel"},
    "nbdmirror serve --tls-c": {"--tls-certificates"},
    "nbdmirror mirror --copy-mode ": {"background", "write-blocking"},
    "nbdmirror mirror --sync f": {"full"},
    "nbdmirror wait --co": {"--concluded"},
    "nbdmirror copy-mode ": {"background", "write-blocking", "points"},
    "nbdmirror bitmap rem": {"remove"},
}


@pytest.fixture
def scripts(tmp_path: Path) -> dict[str, Path]:
    """Shell -> the file that the wheel installs for it."""
    files = completions()
    found = {}
    for shell, place in PLACES.items():
        found[shell] = tmp_path / place
        found[shell].parent.mkdir(parents=True)
        found[shell].write_text(files[place])
    return found


BASH = """
source "$1"
COMP_LINE=$2 COMP_POINT=${#2}
read -ra COMP_WORDS <<<"$2"
[[ $2 != *" " ]] || COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
complete -p nbdmirror >/dev/null || exit 1
_shtab_nbdmirror
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize("line", CASES)
def test_bash(scripts: dict[str, Path], line: str) -> None:
    done = run("bash", "--norc", "--noprofile", "-c", BASH, "bash", scripts["bash"], line)
    assert {word.strip() for word in done.stdout.split("\n") if word.strip()} == CASES[line]


def test_bash_completes_paths(scripts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "disk-one.img").touch()
    done = run("bash", "-c", BASH, "bash", scripts["bash"], f"nbdmirror serve {tmp_path}/disk")
    assert done.stdout.split() == [str(tmp_path / "disk-one.img")]


@pytest.mark.parametrize("line", CASES)
def test_fish(scripts: dict[str, Path], line: str, tmp_path: Path) -> None:
    code = 'source $argv[1]; complete -C "$argv[2]"'
    done = run("env", f"HOME={tmp_path}", "fish", "--no-config", "-c", code, scripts["fish"], line)
    assert {row.partition("\t")[0] for row in done.stdout.splitlines()} == CASES[line]


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("nbdmirror mirr\t", "nbdmirror mirror "),
        ("nbdmirror serve --tls-c\t", "nbdmirror serve --tls-certificates"),
        ("nbdmirror mirror --copy-mode w\t", "nbdmirror mirror --copy-mode write-blocking "),
    ],
)
def test_zsh(scripts: dict[str, Path], tmp_path: Path, typed: str, completed: str) -> None:
    """On a terminal, as typed: zsh has no other way to ask."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "dumb", "HOME": str(tmp_path), "PS1": "", "ZDOTDIR": ""}
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"], env=environ, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    said = b""

    def has_said(text: str) -> bool:
        nonlocal said
        if select.select([ours], [], [], 0)[0]:
            said += os.read(ours, 1 << 16)
        return text in re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]|\r|\x08", "", said.decode())

    try:
        folder = scripts["zsh"].parent
        start = f"fpath=({folder} $fpath); autoload -U compinit; compinit -u -D; print RE''ADY\n"
        os.write(ours, start.encode())
        wait_until(lambda: has_said("READY\n"), "zsh is there")
        said = b""
        os.write(ours, typed.encode())
        wait_until(lambda: has_said(completed), f"zsh completes it: {said!r}")
    finally:
        shell.kill()
        shell.wait(WAIT_S_MAX)
        os.close(ours)


def test_the_program_does_not_need_what_makes_them() -> None:
    for path in (ROOT / "nbdmirror").rglob("*.py"):
        assert "shtab" not in path.read_text()
