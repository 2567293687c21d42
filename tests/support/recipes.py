"""Shell scripts of the documentation, run as they stand there."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support.processes import has_ended, nbdmirror_environment
from support.waiting import STOP_S_MAX, wait_until

SCRIPT_S_MAX = 40


def script_of(page: Path) -> str:
    """All its blocks of shell, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks, page
    return "\n".join(blocks)


@contextlib.contextmanager
def ran(script: str, folder: Path, **environment: str) -> Iterator[str]:
    """What it said, once it has ended, well. Its servers go on until the end of the context, where
    those that have left a pid file in the folder are ended."""
    environ = nbdmirror_environment() | environment
    environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environ["PATH"]])
    output = folder / "output"  # no pipe: what goes into the background would hold it
    try:
        with output.open("w") as file:
            done = subprocess.run(
                ["sh", "-eu", "-c", script],
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                timeout=SCRIPT_S_MAX,
                check=False,
            )
        text = output.read_text(errors="replace")  # nbdinfo without file(1) prints bytes
        assert done.returncode == 0, text
        yield text
    finally:
        for pidfile in folder.glob("*.pid"):
            _end(int(pidfile.read_text() or 0))


def _end(pid: int) -> None:
    """Which may have ended by itself; or does not, but by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: has_ended(pid), f"process {pid} ends", STOP_S_MAX)
            return
