"""Small writes of a point that come while another one is in flight: they go as one request."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

from unit.points.pointparts import FarSide, with_points

from nbdmirror.devices.base import Done
from nbdmirror.points.batch import GATHER_BYTES
from nbdmirror.points.format import BLOCK_BYTES
from nbdmirror.points.requests import Side

DISK_BYTES = 1 << 20


class Held:
    """The writes to the journal of `far`, each of which ends when `end` is called."""

    def __init__(self, far: FarSide) -> None:
        self.sizes: list[int] = []
        self._ends: list[Callable[[], None]] = []
        export = far.exports[Side.JOURNAL]
        self._write = export.start_write
        self._patch = patch.object(export, "start_write", self.start)
        self._patch.start()

    def start(self, buf: memoryview, offset: int, done: Done) -> None:
        self.sizes.append(len(buf))
        self._ends.append(partial(self._write, buf, offset, done))

    def end(self) -> None:
        """End the oldest write."""
        self._ends.pop(0)()

    def end_all(self) -> None:
        while self._ends:
            self.end()

    def release(self) -> None:
        self._patch.stop()


def send(far: FarSide, offset: int, length: int, done: Done) -> None:
    far.fill(offset, length)
    data = memoryview(bytes(far.disk[offset : offset + length]))
    far.writer.put([(offset, length, data)], done)


def test_small_writes_are_joined_and_large_ones_are_not() -> None:
    far = FarSide(DISK_BYTES, 16 << 20)
    far.seed()
    far.point()
    held, done = Held(far), list[BaseException | None]()
    far.begin(DISK_BYTES)
    offsets = [offset * BLOCK_BYTES for offset in (9, 3, 4, 40, 1)]
    for offset in offsets:
        send(far, offset, BLOCK_BYTES, done.append)
    assert held.sizes == [BLOCK_BYTES], "the first one does not wait for others"
    send(far, 512 << 10, GATHER_BYTES, done.append)
    assert held.sizes == [BLOCK_BYTES, 4 * BLOCK_BYTES, GATHER_BYTES]
    send(far, 0, BLOCK_BYTES, done.append)
    held.end()
    assert (done, held.sizes[3:]) == ([None], [BLOCK_BYTES])
    send(far, 50 * BLOCK_BYTES, BLOCK_BYTES, done.append)
    held.end_all()
    assert done == [None] * 8
    held.release()
    far.commit()
    far.recover()
    assert bytes(far.image.data) == far.contents[2] == bytes(far.disk)


def test_all_that_was_joined_fails_together() -> None:
    far = with_points(1)
    held, errors = Held(far), list[BaseException | None]()
    far.begin(3 * BLOCK_BYTES)
    for block in range(3):
        send(far, block * BLOCK_BYTES, BLOCK_BYTES, errors.append)
    held.end()
    far.exports[Side.JOURNAL].failing.add("write")
    held.end()
    assert errors[0] is None
    assert str(errors[1]) == str(errors[2]) == "[Errno 5] write failed"


def test_a_point_is_over_when_what_waits_is_over() -> None:
    """Also if the point is given up when the write ends that others wait for: a write that comes
    late would hit the next point."""
    far = with_points(1)
    held, order = Held(far), list[str]()

    def first_ended(error: BaseException | None) -> None:
        order.append("first")
        far.writer.give_up(lambda _: order.append("given up"))

    far.begin(2 * BLOCK_BYTES)
    send(far, 0, BLOCK_BYTES, first_ended)
    send(far, BLOCK_BYTES, BLOCK_BYTES, lambda error: order.append("second"))
    held.end_all()
    assert order == ["first", "second", "given up"]
    held.release()
    far.point((0, BLOCK_BYTES), (BLOCK_BYTES, BLOCK_BYTES))
    far.recover()
    assert bytes(far.image.data) == far.contents[2] == bytes(far.disk)
