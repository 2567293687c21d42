"""What newer versions around us make better is used where they are there, with the real parts that
this system has."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import nbd
import pytest
from support.fixtures import Start
from support.images import MiB, make_empty, make_image
from support.processes import libnbd_version, nbdkit_version, run
from support.servers import Nbdmirror, QemuNbd
from support.waiting import WAIT_S_MAX

from nbdmirror.devices.base import Extent
from nbdmirror.errors import DeviceError
from nbdmirror.event_loop import Loop
from nbdmirror.nbdclient.block_status import LENGTH_MAX
from nbdmirror.nbdclient.device import NbdDevice

TiB = 1 << 40
SIZE = 8 * TiB
ENOTSUP = 95


def qemu_version() -> tuple[int, ...]:
    found = re.search(r"qemu-nbd (\d+)\.(\d+)", run("qemu-nbd", "--version").stdout)
    assert found
    return tuple(int(number) for number in found.groups())


IS_WIDE = libnbd_version() >= (1, 18) and qemu_version() >= (8, 2)


@pytest.fixture
def device(start: Start, folder: Path) -> Iterator[NbdDevice]:
    """On qemu-nbd, with a large disk that is empty but for its first MiB, driven by a loop."""
    image = make_image(folder / "large.img", MiB, seed=7)
    with image.open("r+b") as file:
        file.truncate(SIZE)
    server = start(QemuNbd(folder, image))
    remote = NbdDevice.open(server.uri())
    loop = Loop(time.monotonic)
    loop.start()
    loop.run(lambda: remote.pool.attach(loop, None)).result(WAIT_S_MAX)
    yield remote
    loop.run(remote.pool.detach).result(WAIT_S_MAX)
    loop.stop(WAIT_S_MAX)
    remote.close()


def result_of(device: NbdDevice, begin: Callable[[Callable[..., None]], None]) -> Any:
    """What `begin(done)`, on the loop's thread, is told at the end."""
    loop = device.pool.shared._loop
    assert loop is not None
    answer: Future[Any] = Future()
    loop.call_soon(lambda: begin(lambda *told: answer.set_result(told)))
    return answer.result(WAIT_S_MAX)


def test_long_requests_are_not_cut_where_lengths_have_64_bits(device: NbdDevice) -> None:
    assert device.pool.shared.is_wide is IS_WIDE
    found, error = result_of(device, lambda done: device.start_extents(MiB, SIZE - MiB, done))
    assert error is None
    expected = SIZE - MiB if IS_WIDE else LENGTH_MAX
    assert found == [Extent(expected, zero=True, hole=True)]
    assert device.extents(0, MiB) == [Extent(MiB, zero=False, hole=False)]


def test_zeroes_of_any_length(device: NbdDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one request where the server can do that at once; what is not in it stays."""
    kept = bytearray(MiB // 2)
    device.pread(memoryview(kept), 0)
    requests = count_zeroes(device, monkeypatch)
    half = SIZE - MiB // 2
    assert result_of(device, lambda done: device.start_zero(MiB // 2, half, True, done)) == (None,)
    assert requests == ([half] if IS_WIDE else requests)
    assert sum(requests) == half
    found, _ = result_of(device, lambda done: device.start_extents(MiB // 2, half, done))
    assert found[0].zero
    again = bytearray(MiB)
    device.pread(memoryview(again), 0)
    assert again == kept + bytes(MiB // 2)


def test_zeroes_that_would_take_long_are_cut(
    device: NbdDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that says of a long range that it has to write the zeroes is asked once."""
    requests = count_zeroes(device, monkeypatch, refuses_fast=True)
    for _ in range(2):
        told = result_of(device, lambda done: device.start_zero(0, 3 * LENGTH_MAX, True, done))
        assert told == (None,)
    wide = [3 * LENGTH_MAX] if IS_WIDE else []
    assert requests == [*wide, *([LENGTH_MAX] * 6)]


def count_zeroes(
    device: NbdDevice, monkeypatch: pytest.MonkeyPatch, *, refuses_fast: bool = False
) -> list[int]:
    """The lengths of the zero requests that are sent from now on."""
    connection, lengths = device.pool.shared, list[int]()
    start = connection.start

    def noted(method: Callable[..., int], *arguments: Any, flags: int = 0, done: Any = None) -> Any:
        if method == connection.handle.aio_zero:
            lengths.append(arguments[0])
            if refuses_fast and flags & nbd.CMD_FLAG_FAST_ZERO:
                return done(DeviceError("as QEMU for an image without holes", ENOTSUP))
        return start(method, *arguments, flags=flags, done=done)

    monkeypatch.setattr(connection, "start", noted)
    return lengths


def test_a_large_empty_disk_is_mirrored(start: Start, folder: Path) -> None:
    """To a server as new as this system has; what the target held far behind is zeroed."""
    image, other = make_image(folder / "source.img", MiB, 8), make_image(folder / "b.img", MiB, 9)
    for path in (image, other):
        with path.open("r+b") as file:
            file.seek(TiB - MiB if path == other else MiB)
            file.write(b"x" * 4096)
            file.truncate(TiB)
    target = start(QemuNbd(folder, other))
    server = start(Nbdmirror(folder, image, bare=True))
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    server.qmp.complete()
    server.stop()
    target.stop()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, other)  # which skips holes


def test_several_disks_have_as_many_threads_as_are_safe(start: Start, folder: Path) -> None:
    """nbdkit before 1.34 ends when a guest vanishes while replies of two threads wait for it."""
    images = [make_empty(folder / name, MiB) for name in ("a", "b")]
    server = start(Nbdmirror(folder, *images))
    words = Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0")
    expected = b"8" if nbdkit_version() >= (1, 34) else b"1"
    assert words[words.index(b"-t") + 1] == expected
