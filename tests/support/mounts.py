"""File systems and block devices that a test makes for itself. Without the right to, the test is
skipped, and says so."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ON_DISK = Path("/var/tmp")
"""By custom never a tmpfs, so likely to have holes, ZERO_RANGE and O_DIRECT."""
FORMATTED_BYTES = 320 << 20
"""XFS has 300 MB at least."""


@contextmanager
def mounted(
    kind: str, options: str = "", image: Path | None = None, *, may_skip: bool = True
) -> Iterator[Path]:
    """A new file system, or the one that is in a file. Not below tmp_path: what a killed test
    leaves mounted there would fail every later run of pytest, which clears that folder. Unmounted
    lazily, so that a failed test's open file does not hide its failure."""
    folder = tempfile.mkdtemp(dir=ON_DISK, prefix="nbdmirror-test-")
    try:
        words = ["-t", kind, *(["-o", options] if options else [])]
        command = ["mount", *words, str(image or kind), folder]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if not may_skip:
                raise
            pytest.skip(f"cannot mount {kind} here: {error}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
    finally:
        os.rmdir(folder)


def formatted(kind: str, image: Path) -> Path:
    """A file that holds an empty file system, for `mounted` with the option `loop`."""
    with image.open("wb") as file:
        file.truncate(FORMATTED_BYTES)
    try:
        subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True, capture_output=True)
    except FileNotFoundError as error:
        pytest.skip(f"no {kind} here: {error}")
    return image


@contextmanager
def loop_device(
    path: Path, *, offset: int = 0, sizelimit: int = 0, sector: int = 512
) -> Iterator[str]:
    part = [f"--offset={offset}", f"--sizelimit={sizelimit}", f"--sector-size={sector}"]
    command = ["losetup", "--find", "--show", *part, str(path)]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop devices here: {error}")
    try:
        yield done.stdout.strip()
    finally:
        subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)
