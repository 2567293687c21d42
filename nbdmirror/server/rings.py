"""Whether a mirror's target is mirrored, or passed on, to the mirror's own disk: a ring, in which
each write would go round for ever. (A target that is the disk itself is another matter: detour.py.)

Only nbdmirrors can be asked, one after the other. A chain of mirrors is no ring."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nbdmirror.devices.base import Done, raw_device
from nbdmirror.disk.disk import Disk
from nbdmirror.errors import TargetRefused
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.sides import ANSWER_S_MAX, Way, leads_to
from nbdmirror.server.detour import ITSELF
from nbdmirror.threads import start_thread


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


def is_on(way: Way, disk: Disk, mirror_of: Callable[[Disk], MirrorJob | None], loop: Loop) -> bool:
    """Whether what is written to `disk` is passed on to what `way` leads to. Not for the loop's
    thread."""

    def passed_on() -> list[NbdDevice]:
        job, source = mirror_of(disk), raw_device(disk.source)
        devices = [job.target if job is not None else None, source]
        return [device for device in devices if isinstance(device, NbdDevice)]

    return any(leads_to(device, way) for device in loop.run(passed_on).result(ANSWER_S_MAX))
