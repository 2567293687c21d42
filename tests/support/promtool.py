"""Prometheus' own checker of metrics and rules, kept in .cache.

It is taken out of Debian's package, which is not installed: a Prometheus would be started with it.
`./run setup` does this by running this file; the tests do it as well, for who calls pytest by hand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from support.debianpackages import PackagesError, command, download

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "promtool"
CHECK_S_MAX = 30.0


def promtool() -> Path | None:
    """None where there are no packages of Debian, and it is not installed. Raises PackagesError."""
    if found := shutil.which("promtool"):
        return Path(found)
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    if not (CACHE / "promtool").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            folder = Path(scratch)
            download(_packages, folder)
            (package,) = folder.glob("*.deb")
            command("dpkg-deb", "-x", package.name, "unpacked", folder=folder)
            tool = folder / "unpacked" / "usr" / "bin" / "promtool"
            if not tool.exists():
                raise PackagesError(f"{package.name} has no promtool")
            os.replace(tool, CACHE / "promtool")
    return CACHE / "promtool"


def _packages() -> list[str]:
    """Since Debian 13 promtool has a package of its own."""
    own = subprocess.run(
        ["apt-cache", "show", "promtool"], capture_output=True, timeout=CHECK_S_MAX, check=False
    )
    return ["prometheus" if own.returncode else "promtool"]


def checked(*words: str, text: str = "", folder: Path | None = None) -> str:
    """What promtool complains of in `text`, its input; empty if it is content, or not to be had on
    this system."""
    if (tool := promtool()) is None:
        return ""
    done = subprocess.run(
        [str(tool), *words],
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        timeout=CHECK_S_MAX,
        check=False,
    )
    said = (done.stdout + done.stderr).strip()
    return said if done.returncode else ""


if __name__ == "__main__":
    try:
        if promtool() is None:
            sys.stderr.write("run: metrics will not be checked with promtool: no apt-get here\n")
    except PackagesError as error:
        sys.exit(f"run: cannot get promtool for the tests: {error}")
