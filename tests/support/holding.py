"""A target that is late: an nbdkit Python plugin that carries out what changes its first bytes only
when it is let go, and everything else at once.

Parameters: image=FILE; hold=FILE: while that exists, changes at offset 0 wait, with their data, and
are carried out after it has gone, the oldest last, and while FILE.last exists the oldest waits on;
held=FILE, which has a byte for each that waits or has waited; multi-conn=0. Only nbdkit loads this
file.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import nbdkit

API_VERSION = 2
HOLD_S_MAX = 60.0
APART_S = 0.3

settings = {"multi-conn": "1", "hold": ""}
image_fd = -1
held: list[object] = []


def config(key: str, value: str) -> None:
    settings[key] = value


def get_ready() -> None:
    global image_fd
    image_fd = os.open(settings["image"], os.O_RDWR)


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def open(readonly: bool) -> int:  # noqa: A001 - nbdkit's name for it
    return 1


def get_size(handle: int) -> int:
    return os.fstat(image_fd).st_size


def can_multi_conn(handle: int) -> bool:
    return settings["multi-conn"] == "1"


def can_flush(handle: int) -> bool:
    return True


def pread(handle: int, buf: bytearray, offset: int, flags: int) -> None:
    os.preadv(image_fd, [buf], offset)


def pwrite(handle: int, buf: bytearray, offset: int, flags: int) -> None:
    _change(bytes(buf), offset)


def zero(handle: int, count: int, offset: int, flags: int) -> None:
    _change(bytes(count), offset)


def trim(handle: int, count: int, offset: int, flags: int) -> None:
    _change(bytes(count), offset)


def flush(handle: int, flags: int) -> None:
    os.fsync(image_fd)


def _change(data: bytes, offset: int) -> None:
    if offset == 0 and Path(settings["hold"]).exists():
        _wait()
    os.pwrite(image_fd, data, offset)


def _wait() -> None:
    """Until let go, and then until those that came later were: so the order is the worst."""
    hold = Path(settings["hold"])
    last = hold.with_suffix(".last")
    me = object()
    held.append(me)
    with Path(settings["held"]).open("ab") as file:
        file.write(b".")
    deadline_s = time.monotonic() + HOLD_S_MAX
    while hold.exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    while held[0] is me and last.exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    time.sleep(APART_S * (len(held) - held.index(me)))
