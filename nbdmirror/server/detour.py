"""Whether a target leads back to the disk through another server that is a client of this one.

Such a server does not report what is behind it. So a few bytes of the target are read while the
disk is watched: a proxy sends the same read to this server. The ranges are random, with random odd
lengths, and all of ROUNDS reads must be seen, so that no guest causes this by chance. The first
read that is not seen ends the search, so other targets get only one read.

A proxy that answers from a cache, or that rounds requests to its blocks, is not detected; nor is
one that does not answer within ANSWER_S_MAX. On the event loop's thread."""

from __future__ import annotations

import random

from nbdmirror.devices.base import AsyncSource, Done, Extent
from nbdmirror.disk.disk import Disk
from nbdmirror.errors import DeviceError, TargetRefused
from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient.device import NbdDevice

ROUNDS = 8
TRIES_MAX = 32
"""Places that are examined for one with data: a proxy may not forward reads of holes."""
EXTENTS_BYTES_MAX = 1 << 30
LENGTH_MAX = 4096
UNITS_MAX = 64
CHOICES_MIN = 1 << 14
"""Least number of choices of offset and length in one place: a target with large blocks leaves few
in a small place."""
ANSWER_S_MAX = 2.0
"""Time for all rounds together."""
ITSELF = "leads back to this server through another server: it is disk"


def check_detour(
    disk: Disk, source: AsyncSource, target: NbdDevice, loop: Loop, done: Done
) -> None:
    """Call `done` with a DeviceError if reads of `target` arrive at `disk`, else with None.
    `source`: the disk's source."""
    _Search(disk, source, target, loop, done).begin_round()


class _Search:
    def __init__(
        self, disk: Disk, source: AsyncSource, target: NbdDevice, loop: Loop, done: Done
    ) -> None:
        self._disk = disk
        self._source = source
        self._target = target
        self._done = done
        self._is_over = False
        self._rng = random.Random()
        self._rounds = self._tries = 0
        self._unit = target.block_size.minimum
        units_max = max(LENGTH_MAX // self._unit, UNITS_MAX)
        self._units_max = min(units_max, target.block_size.maximum // self._unit)
        self._size = disk.size - disk.size % self._unit
        self._watched = disk.watch()
        self._timer = loop.call_later(ANSWER_S_MAX, lambda: self._end(None))

    def begin_round(self) -> None:
        if not self._size:
            self._end(None)
            return
        self._tries += 1
        offset = self._rng.randrange(0, self._size, self._unit)

        def then(extents: list[Extent] | None, error: BaseException | None) -> None:
            if self._is_over:
                return
            start = offset
            for extent in extents or []:
                if not extent.zero and self._choices(extent.length) >= CHOICES_MIN:
                    self._look(start, extent.length)
                    return
                start += extent.length
            if self._tries < TRIES_MAX:
                self.begin_round()
            elif self._choices(self._size) >= CHOICES_MIN:
                self._look(0, self._size)
            else:
                self._end(None)

        length = min(EXTENTS_BYTES_MAX, self._size - offset)
        self._source.start_extents(offset, length, then)

    def _choices(self, length: int) -> int:
        return length // self._unit * self._units_max

    def _look(self, offset: int, length: int) -> None:
        """Read a random part of the range, in bytes, on the target, and check for it at the
        disk."""
        unit, watched = self._unit, self._watched
        start = -(-offset // unit)
        units = max(1, (offset + length) // unit - start)
        first = self._rng.randrange(units)
        count = self._rng.randint(1, min(self._units_max, units - first))
        wanted = (start + first) * unit, count * unit
        watched.wanted, watched.is_seen = wanted, False

        def then(error: BaseException | None) -> None:
            if self._is_over or error is not None or not watched.is_seen:
                self._end(None)
            elif (rounds := self._rounds + 1) == ROUNDS:
                text = f"{self._target.uri}: {ITSELF} '{self._disk.name}'"
                self._end(TargetRefused(text))
            else:
                self._rounds, self._tries = rounds, 0
                self.begin_round()

        self._target.start_read(memoryview(bytearray(wanted[1])), wanted[0], then, whole=True)

    def _end(self, error: DeviceError | None) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._timer.cancel()
        self._disk.unwatch(self._watched)
        self._done(error)
