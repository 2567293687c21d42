"""Guests' requests that wait: a storage that hangs under a disk shows in nothing else, if no mirror
reads the disk. On the event loop's thread.

Requests are looked at now and then, and nothing is noted when one begins: so a wait is known from
the first look on at which it was in progress, and no request takes longer for this."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nbdmirror.amounts import duration
from nbdmirror.disk.disk import Disk
from nbdmirror.event_loop import Loop
from nbdmirror.subject_log import disk_log

WAITS_S, TOLD_S = 5.0, 30.0
"""A request that has waited for so long is a problem, and is reported after TOLD_S."""


@dataclass(slots=True)
class _Seen:
    """Requests of one disk that were in progress at one moment, and still are."""

    since_s: float
    requests: frozenset[int] = frozenset()
    is_told: bool = False


class Waiting:
    def __init__(self, loop: Loop, disks: Iterable[Disk]) -> None:
        self._loop = loop
        self._seen = {disk: _Seen(loop.clock()) for disk in disks}

    def look(self) -> None:
        """Call this every few seconds."""
        now_s = self._loop.clock()
        for disk, seen in self._seen.items():
            waited_s = now_s - seen.since_s
            if seen.requests and (left := seen.requests & _in_progress(disk)):
                seen.requests = left
                if waited_s >= TOLD_S and not seen.is_told:
                    seen.is_told = True
                    disk_log(disk.name).warning("%s", _text(disk, waited_s))
                continue
            if seen.is_told:
                text = "guests' requests are answered again, after %s"
                disk_log(disk.name).warning(text, duration(waited_s))
            self._seen[disk] = _Seen(now_s, _in_progress(disk))

    def problem(self, disk: Disk) -> str:
        """What waits, for how long and for what; "" if nothing waits for long."""
        seen = self._seen[disk]
        waited_s = self._loop.clock() - seen.since_s
        if waited_s < WAITS_S or not seen.requests & _in_progress(disk):
            return ""
        return _text(disk, waited_s)


def _in_progress(disk: Disk) -> frozenset[int]:
    """Those that wait at the gate are not."""
    return disk.ledger.reads() | disk.ledger.writes()


def _text(disk: Disk, waited_s: float) -> str:
    what = disk.source.description
    if disk.synchronous is not None and not disk.ledger.reads():
        what = f"its mirror's target, or {what}"
    return f"a guest's request has waited for {what} for {duration(waited_s)}"
