"""What the fixtures of conftest.py give, by its type, and the folder that they work in."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from guests import Guest
from images import Content
from kept import MEMORIES
from serverprocess import Server

AnyServer = TypeVar("AnyServer", bound=Server)
Start = Callable[[AnyServer], AnyServer]
Identical = Callable[[Content | Guest, Content | Guest], None]

MEMORY = Path("/dev/shm")


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """For images and sockets: in memory where there is such a place, and with a short name, since
    a Unix socket's may have 107 bytes."""
    place = MEMORY if os.access(MEMORY, os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="nbdmirror-", dir=place))
    try:
        yield path
    finally:
        for definition in path.rglob("*.json"):  # of servers with state that were killed
            if match := re.search(
                r'"memory": "(/dev/shm/nbdmirror-state-\w+)"', definition.read_text()
            ):
                shutil.rmtree(match[1], ignore_errors=True)
        for notes in path.rglob(MEMORIES):  # of others that were killed
            for memory in set(notes.read_text().split()):
                shutil.rmtree(memory, ignore_errors=True)
        shutil.rmtree(path)
