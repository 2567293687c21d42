"""Waiting for an applier (follower.py) that must not write to its image any more.

Whoever wants the image writes to the superblock first that nobody has a grant. These programs
pause, and so they are for `requests.run` alone.
"""

from __future__ import annotations

from nbdmirror.points.appliers_block import GONE_S, ApplierBlock, Phase, read_block
from nbdmirror.points.format import JournalError, Superblock
from nbdmirror.points.requests import Pause, Program

PAUSE_S = 0.1
LIMIT_S = 60.0
"""An applier that lives and does not stop for so long is in the way."""


def until_rests(name: str, block: Superblock, export_bytes: int) -> Program[None]:
    """Wait until no applier writes to the image of the journal `name`, whose superblock is `block`
    by now. One that says nothing new for GONE_S is taken to be gone. Raises JournalError."""
    before: ApplierBlock | None = None
    silent_s = waited_s = 0.0
    while True:
        said = yield from read_block(block, export_bytes)
        if said is None or said.phase is not Phase.WORKING:
            return
        silent_s = silent_s if said == before else 0.0
        if said == before and silent_s >= GONE_S:
            return
        if waited_s >= LIMIT_S:
            text = "an `nbdmirror apply` writes to the image, and does not stop: end it"
            raise JournalError(f"{name}: {text}")
        before = said
        yield [Pause(PAUSE_S)]
        silent_s, waited_s = silent_s + PAUSE_S, waited_s + PAUSE_S
