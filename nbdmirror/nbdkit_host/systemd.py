"""Notifications to systemd, with the protocol of sd_notify(3): the server serves, its status, its
end.

Without a supervisor that asks for them (NOTIFY_SOCKET) nothing is sent. For any thread; nothing
here blocks."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterable

from nbdmirror.events import EventRing

READY, STOPPING = "READY=1", "STOPPING=1"


def notify(*assignments: str) -> None:
    """Send `NAME=VALUE` lines, as one message. A missing listener is not an error."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # in the abstract name space
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto("\n".join(assignments).encode(), address)


class Status:
    """The line that `systemctl status` shows: the disks, and the states of their jobs, updated by
    events. A pivoted disk is shown as such, since its configuration should be changed then."""

    def __init__(self, disks: Iterable[str], events: EventRing) -> None:
        self._disks = list(disks)
        self._events = events
        self._lock = threading.Lock()  # a leaf: guards all below, and the order of what is sent
        self._next = events.next_number
        self._jobs: dict[str, str] = {}
        self._pivoted: dict[str, None] = {}  # as an ordered set

    def start(self) -> None:
        """The server serves. Earlier events since the creation of this object count as well."""
        self._events.subscribe(self._wake)
        with self._lock:
            self._pull()
            notify(READY, f"STATUS={self.text}")

    @property
    def text(self) -> str:
        parts = [f"serving {', '.join(self._disks)}"]
        parts += [f"job {job}: {status}" for job, status in self._jobs.items()]
        parts += [f"{disk}: served from its mirror's target" for disk in self._pivoted]
        return "; ".join(parts)

    def _wake(self) -> None:
        with self._lock:
            before = self.text
            self._pull()
            if self.text != before:
                notify(f"STATUS={self.text}")

    def _pull(self) -> None:
        for event in self._events.pull(self._next):
            self._next = event.number + 1
            if event.name == "X_NBDMIRROR_PIVOTED":
                self._pivoted[event.data["device"]] = None
            elif event.name == "JOB_STATUS_CHANGE":
                self._jobs[event.data["id"]] = event.data["status"]
                if event.data["status"] == "null":
                    del self._jobs[event.data["id"]]
