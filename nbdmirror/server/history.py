"""Whether a mirror's target holds a journal of points: the mirror would overwrite all of them.
Image and journal are easily confused, and no server knows what it serves.

On the event loop's thread."""

from __future__ import annotations

from nbdmirror.devices.base import Done
from nbdmirror.errors import TargetRefused
from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.points.format import MAGIC, SLOTS

ANSWER_S_MAX = 2.0
"""Time for the reads. The job itself waits for a target that answers later, or never."""


def check_history(target: NbdDevice, loop: Loop, done: Done) -> None:
    """Call `done` with TargetRefused if the target begins as a journal does, else with None."""
    _Look(target, loop, done).at_next()


class _Look:
    def __init__(self, target: NbdDevice, loop: Loop, done: Done) -> None:
        self._target = target
        self._done = done
        unit = target.block_size.minimum
        self._length = -(-len(MAGIC) // unit) * unit
        self._places = [at for at in SLOTS if not at % unit and at + self._length <= target.size]
        self._is_over = False
        self._timer = loop.call_later(ANSWER_S_MAX, lambda: self._end(None))

    def at_next(self) -> None:
        if not self._places:
            self._end(None)
            return
        buf = bytearray(self._length)

        def then(error: BaseException | None) -> None:
            if self._is_over:
                return
            if error is None and buf.startswith(MAGIC):
                text = "holds points of a disk: zero its first 128 KiB if they may be overwritten"
                self._end(TargetRefused(f"{self._target.uri}: is a journal, and {text}"))
            else:
                self.at_next()

        self._target.start_read(memoryview(buf), self._places.pop(), then)

    def _end(self, error: TargetRefused | None) -> None:
        if not self._is_over:
            self._is_over = True
            self._timer.cancel()
            self._done(error)
