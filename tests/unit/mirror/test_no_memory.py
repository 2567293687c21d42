"""No memory is left for a while: the mirror's policy is asked, and guests hear nothing of it."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from unit.disk.ledgerthreads import running
from unit.mirror.jobparts import KIB, JobWorld
from unit.mirror.pointparts import PointScene

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.mirror import buffers
from nbdmirror.mirror.options import CopyMode, Policy

SIZE = 64 * KIB


class Scarce:
    """Memory for buffers, of which there is none for the first `times`."""

    def __init__(self, times: int) -> None:
        self.times = times
        self._new = buffers.PageBuffer

    def __call__(self, length: int) -> Any:
        if self.times:
            self.times -= 1
            raise MemoryError
        return self._new(length)


@pytest.mark.parametrize("times", [1, 4, 1000])
def test_a_copy_without_a_buffer_is_an_error_of_the_source(times: int) -> None:
    """Nothing counts as copied, and the job goes on when there is memory again."""
    world = JobWorld(on_source_error=Policy.IGNORE)
    with patch.object(buffers, "PageBuffer", Scarce(times)):
        world.start()
        world.pass_s(1.0)
    world.pass_s(20.0)
    assert world.status == "ready"
    events = world.told("BLOCK_JOB_ERROR")
    assert events and {event["operation"] for event in events} == {"read"}
    world.assert_identical()


def test_a_job_that_reports_errors_ends() -> None:
    world = JobWorld()
    with patch.object(buffers, "PageBuffer", Scarce(1000)):
        world.start()
        world.pass_s(1.0)
    (ended,) = world.told("BLOCK_JOB_COMPLETED")
    assert ended["error"] == "Cannot allocate memory"


def test_a_point_without_a_buffer_is_broken_and_holds_nobody() -> None:
    device = MemoryDevice(SIZE)
    scene = PointScene(device)
    scene.disk.pwrite(memoryview(b"a" * SIZE), 0, fua=False)
    assert scene.cut()
    with patch.object(buffers, "PageBuffer", Scarce(1000)):
        assert not scene.send()
    with running(lambda: scene.disk.pwrite(memoryview(b"b" * SIZE), 0, fua=False)):
        pass
    assert scene.cut() and scene.send()
    assert scene.far == device.data


def test_a_guests_write_that_waits_for_the_target_succeeds() -> None:
    """The target's side has no memory: the source has the write, and the mirror copies it."""
    world = JobWorld(copy_mode=CopyMode.WRITE_BLOCKING, on_target_error=Policy.IGNORE).ready()
    world.target.guests_error = MemoryError()
    world.write()
    world.target.guests_error = None
    world.pass_s(10.0)
    (event,) = world.told("BLOCK_JOB_ERROR")
    assert (event["operation"], event["action"]) == ("write", "ignore")
    world.assert_identical()
