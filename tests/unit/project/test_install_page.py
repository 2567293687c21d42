"""The commands of docs/install.md: a version beside another one, and links on a system that has
none of their folders yet."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from support.processes import ROOT

PAGES = (
    "man/man1/nbdmirror.1",
    "man/man7/nbdmirror-qmp.7",
    "bash-completion/completions/nbdmirror",
)
PYTHON = """#!/bin/sh
for place; do :; done
mkdir -p "$place/bin"
printf '#!/bin/sh\\necho %s\\n' "${place##*-}" >"$place/bin/nbdmirror"
chmod 755 "$place/bin/nbdmirror"
ln -s /bin/true "$place/bin/pip"
"""
"""Makes an environment whose nbdmirror tells its version."""


def block_with(text: str) -> str:
    page = (ROOT / "docs/install.md").read_text()
    blocks: list[str] = re.findall(r"(?:^    .+\n)+", page, re.MULTILINE)
    (block,) = (one for one in blocks if text in one)
    return block


def run_in(folder: Path, block: str) -> subprocess.CompletedProcess[str]:
    script = re.sub(r"(?<= )/(?=(opt|usr|etc)/)", f"{folder}/", block)
    return subprocess.run(["sh", "-eu", "-c", script], capture_output=True, text=True, check=False)


def test_a_version_is_installed_beside_another_one(tmp_path: Path) -> None:
    _, *install = block_with("-m venv").splitlines()  # but for the packages of the system
    upgrade = install[: next(i for i, line in enumerate(install) if "ln -sfnT" in line) + 1]
    for folder in ("opt", "usr/bin", "usr/local/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "usr/bin/python3").write_text(PYTHON)
    (tmp_path / "usr/bin/python3").chmod(0o755)
    for version, lines in (("1", install), ("2", upgrade), ("1", upgrade[-1:])):
        done = run_in(tmp_path, "\n".join(lines).replace("VERSION", version))
        assert not done.returncode, done.stderr
        command = [str(tmp_path / "usr/local/bin/nbdmirror")]
        assert subprocess.run(command, capture_output=True, check=True).stdout.decode() == (
            f"{version}\n"
        )
    (tmp_path / "opt/nbdmirror").unlink()
    (tmp_path / "opt/nbdmirror").mkdir()
    assert run_in(tmp_path, upgrade[-1].replace("VERSION", "2")).returncode


def test_links_in_a_bare_system(tmp_path: Path) -> None:
    block = block_with("share/man/man1")
    for page in PAGES:
        (tmp_path / "opt/nbdmirror/share" / page).parent.mkdir(parents=True)
        (tmp_path / "opt/nbdmirror/share" / page).touch()
    done = run_in(tmp_path, block)
    assert not done.returncode, done.stderr
    for place in ("usr/local/share/man/man1", "usr/local/share/man/man7", "etc/bash_completion.d"):
        assert [link for link in (tmp_path / place).iterdir() if link.is_file()], place
