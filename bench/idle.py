"""A server of many mirrors that have nothing to do: what it costs to have them."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path

from bench.lab import SUBJECTS, Lab, MiB
from bench.measures import READY, Figures
from bench.servers import NbdkitFolder, Nbdmirror

MIRRORS = 100
DISK_BYTES = MiB

SETTLE_S = 15.0
"""After the last mirror is ready: by then targets are flushed, and states are saved."""


def processor(lab: Lab, subject: str, *, has_state: bool = False) -> Figures:
    """The processor time of one server whose MIRRORS mirrors are ready, while no guest writes, in
    per cent of one processor. `has_state`: with a state directory, unless it is `without`."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=lab.folder)))
        images = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=lab.folder)))
        options: tuple[str, ...] = ()
        if has_state and subject != "without":
            state = stack.enter_context(tempfile.TemporaryDirectory(dir=lab.disk_folder))
            options = ("--state-dir", state)
        target = NbdkitFolder(lab.folder, images)
        disks = [_holes(folder / f"disk{number}") for number in range(MIRRORS)]
        for number in range(MIRRORS):
            _holes(images / target.export(number))
        stack.enter_context(target)
        kind = SUBJECTS.get(subject, Nbdmirror)
        server = stack.enter_context(kind(lab.folder, disks, options=options))
        for number in range(MIRRORS):
            server.add_target(target, number)
        jobs = [server.start_mirror(number) for number in range(MIRRORS)]
        for job in jobs:
            server.qmp.wait_for(READY, job)
        time.sleep(SETTLE_S)
        began_s, before_s = time.monotonic(), server.processor_s()
        time.sleep(10.0 if lab.is_quick else 30.0)
        used_s = server.processor_s() - before_s
        return {"processor": 100 * used_s / (time.monotonic() - began_s)}


def _holes(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    return path
