"""A target that forgets: an nbdkit Python plugin whose image file gets what was written at a flush,
and no sooner. `kill -9` loses the rest, as a host's crash does with a page cache.

Parameters: image=FILE; log=FILE, a line a request; order=FILE, see `_obey`; multi-conn=0 and
extents=0 switch these off; read-only=1. Only nbdkit loads this file.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import nbdkit

API_VERSION = 2
HOLD_S_MAX = 20.0

settings = {"multi-conn": "1", "extents": "1", "read-only": "0"}
content = bytearray()
unflushed: list[tuple[int, int]] = []
image_fd = log_fd = -1


def config(key: str, value: str) -> None:
    settings[key] = value


def get_ready() -> None:
    global image_fd, log_fd
    image_fd = os.open(settings["image"], os.O_RDWR)
    log_fd = os.open(settings["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    content[:] = Path(settings["image"]).read_bytes()


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS)


def open(readonly: bool) -> int:  # noqa: A001 - nbdkit's name for it
    return 1


def get_size(handle: int) -> int:
    return len(content)


def can_write(handle: int) -> bool:
    return settings["read-only"] == "0"


def can_multi_conn(handle: int) -> bool:
    return settings["multi-conn"] == "1"


def can_fua(handle: int) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_extents(handle: int) -> bool:
    return settings["extents"] == "1"


def extents(handle: int, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Zero or data, in blocks of 4 KiB."""
    found = []
    end = offset + count
    while offset < end:
        length = min(4096 - offset % 4096, end - offset)
        is_zero = not any(content[offset : offset + length])
        found.append((offset, length, nbdkit.EXTENT_ZERO if is_zero else 0))
        offset += length
    return found


def pread(handle: int, buf: bytearray, offset: int, flags: int) -> None:
    _obey("read", offset, len(buf))
    buf[:] = content[offset : offset + len(buf)]


def pwrite(handle: int, buf: bytearray, offset: int, flags: int) -> None:
    _obey("write", offset, len(buf))
    _change(offset, bytes(buf), flags)


def zero(handle: int, count: int, offset: int, flags: int) -> None:
    _obey("zero", offset, count)
    _change(offset, bytes(count), flags)


def trim(handle: int, count: int, offset: int, flags: int) -> None:
    _obey("trim", offset, count)
    _change(offset, bytes(count), flags)


def flush(handle: int, flags: int) -> None:
    _obey("flush", 0, 0)
    for offset, length in unflushed:
        os.pwrite(image_fd, content[offset : offset + length], offset)
    unflushed.clear()


def _change(offset: int, data: bytes, flags: int) -> None:
    content[offset : offset + len(data)] = data
    if flags & nbdkit.FLAG_FUA:
        os.pwrite(image_fd, data, offset)
    else:
        unflushed.append((offset, len(data)))


def _obey(kind: str, offset: int, length: int) -> None:
    """The order file says "kill write 3", at the third write from now be killed before it is done;
    "fail flush 1", fail the next flush with EIO; or "hold flush 1", let the next one wait until
    there is another order. One order at a time, done once."""
    os.write(log_fd, f"{kind} {offset} {length}\n".encode())
    path = Path(settings["order"])
    try:
        verb, of_kind, count = path.read_text().split()
    except FileNotFoundError:
        return
    if of_kind != kind:
        return
    if int(count) > 1:
        path.write_text(f"{verb} {kind} {int(count) - 1}")
        return
    if verb == "hold":
        deadline_s = time.monotonic() + HOLD_S_MAX
        while path.read_text() == f"hold {kind} 1" and time.monotonic() < deadline_s:
            time.sleep(0.01)
        return
    path.unlink()
    if verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    nbdkit.set_error(errno.EIO)
    raise OSError(errno.EIO, "as ordered")
