"""What the servers of this host have open: the storage behind an export, which no client is told.

Only what this process may see. The kernel is queried, and no storage. For any thread.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nbdmirror import syscalls as linux
from nbdmirror.layers import Layer, layers_of_device, share_storage, size_of_device

INIT = 1
"""A socket on which process 1 listens may belong to any server: systemd passes it on."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A file or block device that a process has open for writing."""

    layers: list[Layer]
    size: int
    """Bytes."""
    is_read: bool
    """It is open for reading too, as an image is; a log is not."""


def has_proc() -> bool:
    """Whether /proc is mounted: in a chroot or an initrd it may not be. Without it no process is
    seen."""
    return os.path.isdir("/proc/self")


def processes() -> list[int]:
    """All of this host that are seen, ascending; none without /proc."""
    with suppress(OSError):
        return sorted(map(int, filter(str.isdecimal, os.listdir("/proc"))))
    return []


def holders(listeners: Collection[int]) -> frozenset[int]:
    """The processes of this host that have a socket with one of these inodes."""
    links, found = {f"socket:[{listener}]" for listener in listeners}, set()
    for process in processes() if links else ():
        with suppress(OSError):  # ended, or not permitted
            for fd in os.listdir(f"/proc/{process}/fd"):
                with suppress(OSError):
                    if os.readlink(f"/proc/{process}/fd/{fd}") in links:
                        found.add(int(process))
                        break
    return frozenset(found - {INIT})


def other_networks() -> list[str]:
    """A process in each network namespace of this host, except in the one of this process."""
    found: dict[str, str] = {}
    for process in ["self", *map(str, processes())]:
        with suppress(OSError):  # ended, or not permitted
            found.setdefault(os.readlink(f"/proc/{process}/ns/net"), process)
    return [process for process in found.values() if process != "self"]


class _Looks(threading.local):
    found: dict[frozenset[int], list[Storage]] | None = None


_looks = _Looks()


@contextmanager
def one_look() -> Iterator[None]:
    """Within this, on this thread, each server is looked at once: many exports may be one
    server's, and many are compared with each other."""
    before, _looks.found = _looks.found, {}
    try:
        yield
    finally:
        _looks.found = before


def written_by(servers: Iterable[int]) -> list[Storage]:
    """What these processes, and their copies for single clients, have open for writing."""
    processes = frozenset(servers)
    if _looks.found is None:
        return _look(processes)
    if processes not in _looks.found:
        _looks.found[processes] = _look(processes)
    return _looks.found[processes]


def _look(servers: frozenset[int]) -> list[Storage]:
    found: dict[object, Storage] = {}
    for process in _with_copies(servers):
        for storage in _written_by(process):
            thing = storage.layers[0].thing
            if thing not in found or storage.is_read:  # it may be open more than once
                found[thing] = storage
    return list(found.values())


def sole(storages: list[Storage], size: int) -> Storage | None:
    """What an export of `size` bytes is made of, if that is certain: the server has one file or
    device of this size. A size that differs may be that of an image with a format, or a part."""
    images = [one for one in storages if one.is_read and one.size == size]
    return images[0] if len(images) == 1 else None


def is_one(one: Storage | None, other: Storage | None) -> bool:
    """Whether both are known, and share storage."""
    return one is not None and other is not None and bool(share_storage(one.layers, other.layers))


def _with_copies(servers: Iterable[int]) -> set[int]:
    """The processes, and the children that run the same program: nbd-server has one for each
    client. Children that run another program are other servers, of a supervisor."""
    found: set[int] = set()
    waiting = [process for process in servers if process not in (0, INIT)]
    while waiting:
        process = waiting.pop()
        found.add(process)
        with suppress(OSError):
            program = os.readlink(f"/proc/{process}/exe")
            for child in set(_children(process)) - found - {os.getpid()}:
                with suppress(OSError):
                    if os.readlink(f"/proc/{child}/exe") == program:
                        waiting.append(child)
    return found


def _children(process: int) -> Iterator[int]:
    tasks = f"/proc/{process}/task"
    for task in os.listdir(tasks):
        with suppress(OSError):
            yield from map(int, Path(f"{tasks}/{task}/children").read_text().split())


def _written_by(process: int) -> Iterator[Storage]:
    folder = f"/proc/{process}"
    with suppress(OSError):
        for fd in os.listdir(f"{folder}/fd"):
            with suppress(OSError):
                access = _flags(f"{folder}/fdinfo/{fd}") & os.O_ACCMODE
                status = linux.known_status(f"{folder}/fd/{fd}")
                if access == os.O_RDONLY or status is None:
                    continue
                is_read = access == os.O_RDWR
                if stat.S_ISBLK(status.mode):
                    layers = layers_of_device(status.number)
                    yield Storage(layers, size_of_device(status.number), is_read)
                elif stat.S_ISREG(status.mode):
                    layers = [Layer(("file", status.device, status.inode))]
                    yield Storage(layers, status.size, is_read)


def _flags(fdinfo: str) -> int:
    """The flags of an open descriptor. (proc(5))"""
    lines = Path(fdinfo).read_text().splitlines()
    return next((int(line.split()[1], 8) for line in lines if line.startswith("flags:")), 0)
