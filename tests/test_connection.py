"""Connection: whose reply is whose while driving changes hands. The rest is tested by what uses it:
test_device_contract, integration/test_nbd_source, and the tests with lost servers."""

from __future__ import annotations

import time
from pathlib import Path

from fixtures import Start
from images import MiB, make_noise
from servers import QemuNbd

from nbdmirror.connection import Connection
from nbdmirror.loop import Loop


def test_a_leader_that_is_late_leaves_the_loops_replies_to_the_loop(
    start: Start, folder: Path
) -> None:
    """A guest's thread had just seen that something can be read when the loop took over, and what
    it then reads is the answer to a request of the loop's."""
    image = make_noise(folder / "disk.img", MiB)
    connection = Connection.open(start(QemuNbd(folder, image)).uri(), 5.0)
    loop = Loop(time.monotonic)
    connection.attach(loop)
    told: list[BaseException | None] = []
    buffer = memoryview(bytearray(512))
    connection.start(connection.handle.aio_pread, buffer, 0, done=told.append)
    while connection.is_busy:
        connection._drive()
    loop.run_once(1.0)
    assert told == [None]
    assert buffer == image.read_bytes()[:512]
    connection.close()
