"""A disk whose points go to a far side in memory, on an event loop that the test turns."""

from __future__ import annotations

import time
from collections.abc import Callable

from unit.disk.ledgerthreads import WAIT_S

from nbdmirror.devices.async_file import FileSource
from nbdmirror.devices.base import BlockDevice
from nbdmirror.disk.changes import Changes
from nbdmirror.disk.disk import Disk
from nbdmirror.event_loop import Loop
from nbdmirror.mirror.cut import CUT_LIMIT_S, Cut
from nbdmirror.mirror.frozen_view import Chunk
from nbdmirror.mirror.point_lag import PointLag
from nbdmirror.mirror.point_source import PointSource, StoreOptions


class PointScene:
    """`far`: the content of the last committed point."""

    def __init__(
        self,
        device: BlockDevice,
        *,
        granularity: int = 4096,
        unit: int = 0,
        store: StoreOptions | None = None,
        loop: Loop | None = None,
    ) -> None:
        self.device = device
        self.disk = Disk("disk", device)
        self.loop = loop or Loop(time.monotonic)
        self.changes = Changes(self.disk, granularity, unit=unit)
        self.lag = PointLag(self.changes, time.monotonic, time.monotonic())
        self.far = bytearray(device.size)
        self.chunks: list[Chunk] = []
        self.errors: list[BaseException] = []
        self.sent_bytes = 0
        self.at_take: Callable[[], None] = lambda: None
        """Called behind the closed gate."""
        self.points = PointSource(
            changes=self.changes,
            source=FileSource(device, self.loop.call_soon),
            lag=self.lag,
            loop=self.loop,
            store=store or StoreOptions(),
            on_chunk=self.chunks.append,
            on_more=lambda: None,
            on_broken=self.errors.append,
        )
        self.changes.begin()

    def until(self, is_true: Callable[[], bool]) -> None:
        """Turn the loop until that is so."""
        end_s = time.monotonic() + WAIT_S
        while not is_true():
            assert time.monotonic() < end_s, "nothing happens"
            self.loop.run_once(0.01)

    def cut(self, limit_s: float = CUT_LIMIT_S) -> bool:
        """Begin a point. False if guests were not idle within `limit_s`."""
        self.changes.look()
        self.points.prepare()
        told: list[bool] = []
        Cut(
            [self.disk.ledger],
            loop=self.loop,
            take=self._take,
            on_taken=lambda held_s: told.append(True),
            on_late=lambda held_s: told.append(False),
            limit_s=limit_s,
        ).start()
        self.until(lambda: bool(told))
        return told[0]

    def _take(self) -> None:
        self.at_take()
        self.points.take()

    def send(self) -> bool:
        """Bring the point to the far side and commit it. False if it was broken."""
        batch: list[tuple[int, bytes]] = []

        def is_over() -> bool:
            view = self.points.view
            if view is None:
                return True
            while view.in_flight_bytes < 8 << 20 and view.read_next():
                pass
            while self.chunks:
                chunk = self.chunks.pop()
                for at, length, content in chunk.runs:
                    batch.append((at, bytes(length) if content is None else bytes(content)))
                view.settled(chunk)
            return view.is_settled

        self.until(is_over)
        if self.points.view is None:
            self.chunks.clear()
            return False
        for at, content in batch:
            self.far[at : at + len(content)] = content
            self.sent_bytes += len(content)
        return self.points.committed()
