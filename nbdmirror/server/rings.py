"""Whether a mirror's target is mirrored, or passed on, to the mirror's own disk: a ring, in which
each write would go round for ever. (A target that is the disk itself is another matter: detour.py.)

Only nbdmirrors can be asked, one after the other. A chain of mirrors is no ring."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from nbdmirror.devices.base import Done, raw_device
from nbdmirror.disk.disk import Disk
from nbdmirror.errors import TargetRefused
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.sides import ANSWER_S_MAX, JOURNAL, Way, leads_to
from nbdmirror.server.detour import ITSELF
from nbdmirror.threads import start_thread


class Mirrors(Protocol):
    def of(self, disk: Disk) -> MirrorJob | None:
        """The job that mirrors `disk` now."""

    def journal_of(self, disk: Disk) -> str:
        """The ID of `disk` in the journal that has its points, in hexadecimal; "": none has."""


def check_ring(disk: Disk, target: NbdDevice, loop: Loop, done: Done) -> None:
    """Call `done` with TargetRefused if `target` leads to `disk`, else with None. On the loop's
    thread."""
    peer = target.pool.shared.peer

    def look() -> None:
        error = None
        if leads_to(target, Way.to(disk.name)):
            text = f"{target.uri}: {ITSELF} '{disk.name}', or is mirrored to that"
            error = TargetRefused(text)
        loop.call_soon(partial(done, error))

    if peer is not None and peer.label:
        start_thread(look, "nbdmirror-ring")
    else:
        done(None)


def is_on(way: Way, disk: Disk, mirrors: Mirrors, loop: Loop) -> bool:
    """Whether `disk` is what `way` leads to, or what is written to `disk` is passed on to that. Not
    for the loop's thread."""

    def passed_on() -> tuple[str, list[NbdDevice]]:
        job, source = mirrors.of(disk), raw_device(disk.source)
        devices = [job.target if job is not None else None, source]
        return mirrors.journal_of(disk), [one for one in devices if isinstance(one, NbdDevice)]

    journal, devices = loop.run(passed_on).result(ANSWER_S_MAX)
    if way.server == JOURNAL and way.disk == journal:
        return True
    return any(leads_to(device, way) for device in devices)
