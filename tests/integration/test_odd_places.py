"""A target that passes zeroes and trims on to a block device, and refuses those that its blocks do
not fit, though it has announced no blocks: neither the mirror nor the guest notices."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_image, make_noise
from support.mounts import loop_device
from support.seeds import SEED
from support.serverprocess import Server
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd

from nbdmirror.nbdclient.zeroing import UNIT, is_odd, split

SIZE = 4 * MiB
SERVERS: dict[str, Callable[[Path, str], Server]] = {
    "nbdkit": lambda folder, device: NbdkitTarget(folder, "file", device),
    "qemu-nbd": QemuNbd,
}


@pytest.fixture(params=[512, 4096])
def device(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    image = make_noise(folder / "target.img", SIZE, SEED)
    with loop_device(image, sector=request.param) as device:
        yield device


@pytest.fixture(params=SERVERS)
def target(start: Start, folder: Path, device: str, request: pytest.FixtureRequest) -> Server:
    return start(SERVERS[request.param](folder, device))


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_a_guest_over_a_pivot(
    start: Start, identical: Identical, folder: Path, target: Server, device: str, mode: str
) -> None:
    disk = make_image(folder / "disk.img", SIZE, SEED)
    server = start(Nbdmirror(folder, f"vda={disk}"))
    with Guest(server.uri(), disk, seed=SEED, connections=2) as guest:
        server.qmp.start_mirror(target.uri(), device="vda", copy_mode=mode)
        server.qmp.wait_ready()
        guest.wait_for_requests(150)
        server.qmp.complete()
        guest.wait_for_requests(150)
    identical(guest, Path(device))


def test_each_kind_of_request(start: Start, folder: Path, target: Server) -> None:
    """As a disk of its own, without a mirror: FUA, holes and not."""
    server = start(Nbdmirror(folder, target.uri()))
    model = bytearray(SIZE)
    rng = random.Random(SEED)
    with connected(server.uri()) as guest:
        guest.pwrite(model, 0)
        for _ in range(200):
            offset = rng.randrange(SIZE)
            length = min(rng.choice([1, 511, 512, 4096, 5000, 70_000]), SIZE - offset)
            if rng.random() < 0.5:
                data = rng.randbytes(length)
                guest.pwrite(data, offset)
                model[offset : offset + length] = data
            else:
                guest.zero(length, offset, rng.choice([0, 1, 2, 3]))  # FUA, NO_HOLE
                model[offset : offset + length] = bytes(length)
            guest.trim(length, SIZE - length, rng.choice([0, 1]))
            guest.zero(SIZE // 8, SIZE - SIZE // 8)  # a trimmed range reads as anything
            model[SIZE - SIZE // 8 :] = bytes(SIZE // 8)
        assert guest.pread(SIZE, 0) == model


def test_split() -> None:
    """The parts are the range, in its order; odd ones lie in one unit each."""
    rng = random.Random(SEED)
    for _ in range(2000):
        part = rng.randrange(5 * UNIT), rng.randrange(1, 5 * UNIT)
        parts = split(part)
        assert parts[0][0] == part[0]
        assert sum(length for _, length in parts) == part[1]
        for (offset, length), following in zip(parts, [*parts[1:], (sum(part), 1)], strict=True):
            assert offset + length == following[0]
            assert length > 0
            assert not is_odd((offset, length)) or offset // UNIT == (offset + length - 1) // UNIT
