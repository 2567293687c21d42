"""A command that waits for a server that hangs says so, and for which one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from support.waiting import wait_until
from unit.mirror.copierparts import Clock

from nbdmirror.cli.attended import Attended
from nbdmirror.cli.words import SILENT_S
from nbdmirror.devices.base import MemoryDevice


class Hanging(MemoryDevice):
    def __init__(self) -> None:
        super().__init__(4096, description="nbd://b/vda")
        self.may_answer = threading.Event()

    def flush(self) -> None:
        self.may_answer.wait()


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    device = Hanging()
    yield device
    device.may_answer.set()


def test_a_disk_that_hangs_is_named(hanging: Hanging, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    disk = Attended(hanging, clock)
    disk.pwrite(b"x", 0)
    asking = threading.Thread(target=disk.flush)
    asking.start()
    wait_until(lambda: disk._since_s is not None, "it is asked")
    told = []
    for _ in range(40):
        clock.now_s += 1.0
        disk.look()
        told += capsys.readouterr().err.splitlines()
    assert told[0] == "nbdmirror: nbd://b/vda: has not answered for 0:05; check its server"
    assert [line.split(" for ")[1][:4] for line in told] == ["0:05", "0:10", "0:20", "0:40"]
    hanging.may_answer.set()
    asking.join()
    clock.now_s += 1000.0
    disk.look()
    assert not capsys.readouterr().err
    disk.close()


def test_it_is_the_disk(capsys: pytest.CaptureFixture[str]) -> None:
    inner = MemoryDevice(8192)
    disk = Attended(inner)
    disk.pwrite(b"abcd" * 1024, 4096)
    buf = bytearray(4)
    disk.pread(memoryview(buf), 4096)
    assert buf == b"abcd"
    assert disk.extents(0, 8192) == inner.extents(0, 8192)
    disk.zero(4096, 2048)
    disk.trim(6144, 2048)
    disk.flush()
    assert not any(inner.data) and disk.size == 8192 and SILENT_S > 1
    disk.close()
    assert not capsys.readouterr().err
