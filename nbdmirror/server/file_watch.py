"""FileWatch: detects that a disk's file was truncated, deleted, moved or replaced, and that it
holds an image with a format.

Requests do not show this, or only late: a server continues with the file that it has opened. So a
thread for each file system checks the files regularly; one file system may hang.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from nbdmirror.devices.base import raw_device
from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.formats import HEAD_BYTES, format_of
from nbdmirror.disk.disk import Disk
from nbdmirror.errors import IO_ERRORS
from nbdmirror.events import EventRing
from nbdmirror.subject_log import disk_log

LOOK_S = 1.0

_FORMAT = (
    "begins as a {kind} image does, and is served as it is: the first guest that writes to it "
    "destroys that image; for its content serve what exports it: qemu-nbd --format={kind}"
)


class FileWatch:
    """Reports each change once. `start` and `stop` are for any thread."""

    def __init__(self, disks: Mapping[str, Disk], events: EventRing) -> None:
        self._disks = disks
        self._events = events
        self.changes: dict[str, str] = {}
        """The change of each disk's file, by the disk's name; "" for an unchanged file."""
        self.formats: dict[str, str] = {}
        """Of disks that begin as an image with a format does."""
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start the threads. After nbdkit has forked."""
        storages: dict[int, dict[str, Disk]] = {}
        for name, disk in self._disks.items():
            if isinstance(source := raw_device(disk.source), FileDevice):
                storages.setdefault(source.storage, {})[name] = disk
        for disks in storages.values():
            run = partial(self._run, disks)
            threading.Thread(target=run, name="nbdmirror-files", daemon=True).start()

    def stop(self) -> None:
        """End the threads; does not wait for them."""
        self._stopping.set()

    def look(self, disks: Mapping[str, Disk]) -> None:
        """Check the files of `disks` once. May wait for their file system."""
        for name, disk in disks.items():
            source = raw_device(disk.source)
            reason = source.change() if isinstance(source, FileDevice) else ""
            if reason and reason != self.changes.get(name):
                disk_log(name).error("%s", reason, about={"reason": reason})
                data = {"device": name, "reason": reason}
                self._events.append("X_NBDMIRROR_SOURCE_CHANGED", data)
            self.changes[name] = reason

    def look_at_formats(self, disks: Mapping[str, Disk]) -> None:
        """Look how each disk begins. May wait for the file system."""
        for name, disk in disks.items():
            source = raw_device(disk.source)
            if not isinstance(source, FileDevice) or source.size < HEAD_BYTES:
                continue
            with mmap.mmap(-1, HEAD_BYTES) as head:  # aligned, for O_DIRECT
                with suppress(*IO_ERRORS), memoryview(head) as buf:
                    source.pread(buf, 0)
                kind = format_of(head[:])
            if kind:
                self.formats[name] = _FORMAT.format(kind=kind)
                disk_log(name).warning("%s: %s", source.description, self.formats[name])

    def _run(self, disks: Mapping[str, Disk]) -> None:
        self.look_at_formats(disks)
        while not self._stopping.wait(LOOK_S):
            self.look(disks)
