"""The links of docs/install.md can be made on a system that has none of their folders yet."""

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


def test_links_in_a_bare_system(tmp_path: Path) -> None:
    text = (ROOT / "docs/install.md").read_text()
    blocks = re.findall(r"(?:^    .+\n)+", text, re.MULTILINE)
    (block,) = [block for block in blocks if "share/man/man1" in block]
    for page in PAGES:
        (tmp_path / "opt/nbdmirror/share" / page).parent.mkdir(parents=True)
        (tmp_path / "opt/nbdmirror/share" / page).touch()
    script = re.sub(r"(?<= )/(?=(opt|usr|etc)/)", f"{tmp_path}/", block)
    done = subprocess.run(["sh", "-eu", "-c", script], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    for place in ("usr/local/share/man/man1", "usr/local/share/man/man7", "etc/bash_completion.d"):
        assert [link for link in (tmp_path / place).iterdir() if link.is_file()], place
