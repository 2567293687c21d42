"""Debian's packages, downloaded and not installed: for what tests need a file or two of, and no
more."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

COMMAND_S_MAX = 300.0


class PackagesError(Exception):
    """A package cannot be had; the text says why, in one line."""


def download(names: Callable[[], list[str]], folder: Path) -> None:
    """The packages, as files, into `folder`. `names` may ask apt. Raises PackagesError."""
    try:
        command("apt-get", "-q", "download", *names(), folder=folder)
    except PackagesError:
        # The lists of packages may be absent or stale.
        if os.geteuid() == 0:
            command("apt-get", "-q", "update", folder=folder)
        command("apt-get", "-q", "download", *names(), folder=folder)


def command(*words: str, folder: Path) -> str:
    """Its stdout. Raises PackagesError."""
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_S_MAX,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise PackagesError(f"{' '.join(words)}: {last}")
    return done.stdout
