"""A device that is closed has no open connection, whatever was requested: not only from the next
collection of garbage on, which may be long after."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fixtures import Start
from support.images import MiB, make_noise
from support.servers import QemuNbd

from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient.device import NbdDevice

Begin = Callable[[NbdDevice, Callable[..., None]], None]

REQUESTS: dict[str, Begin] = {
    "read": lambda device, done: device.start_read(memoryview(bytearray(512)), 0, done),
    "write": lambda device, done: device.start_write(memoryview(bytes(512)), 0, done),
    "zero": lambda device, done: device.start_zero(0, MiB, True, done),
    "flush": lambda device, done: device.start_flush(done),
    "extents": lambda device, done: device.start_extents(0, MiB, done),
}


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_closed_device_has_no_connection(
    start: Start, folder: Path, no_garbage_collection: None, request_: str
) -> None:
    server = start(QemuNbd(folder, make_noise(folder / "disk.img", MiB)))
    device, loop = NbdDevice.open(server.uri()), Loop(time.monotonic)
    device.pool.attach(loop, None)
    told: list[Any] = []
    REQUESTS[request_](device, lambda *results: told.append(results))
    while not told:
        loop.run_once(1.0)
    descriptor = device.pool.shared.handle.aio_get_fd()
    device.pool.detach()
    device.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
