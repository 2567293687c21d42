"""Snapshots of an RBD image that are points, made by another client than the qemu-nbd that serves
it, which has a cache. The commands are those of docs/disaster-recovery.md."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from integration.mirror.snapshots.storageparts import SIZE, documented, try_storage
from support.cephnode import CLIENT, POOL, Ceph, RbdNbd, missing
from support.fixtures import Start
from support.images import chunks, make_noise
from support.serverprocess import Server
from support.servers import QemuNbd

if lacking := missing():
    pytest.skip(f"no Ceph to try, for want of: {lacking}", allow_module_level=True)

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("ceph")]  # of one node

names = (f"snapshots{number}" for number in itertools.count(1))


class Rbd:
    """qemu-nbd of a new image; `options` are those of its making."""

    def __init__(self, start: Start, folder: Path, ceph: Ceph, *options: str) -> None:
        self._start, self._folder, self._ceph = start, folder, ceph
        self.name = next(names)
        ceph.add_image(self.name, make_noise(folder / self.name, SIZE), *options)
        self.server: Server = start(RbdNbd(folder, ceph, self.name))
        rights = f"rbd --conf {ceph.configuration} --id {CLIENT} "
        self.command = documented(
            "a Ceph image", {"rbd ": rights, "rbd/vda": f"{POOL}/{self.name}"}
        )

    def snapshot(self, time: str) -> bytes:
        snapshot = self._ceph.location(f"{self.name}@{time}")
        with QemuNbd(self._folder, snapshot, read_only=True) as server:
            return b"".join(chunks(server.uri()))

    def recover(self, time: str) -> str:
        """The image itself goes back."""
        self._ceph.admin("rbd", "snap", "rollback", "--no-progress", f"{POOL}/{self.name}@{time}")
        return self._start(self.server).uri()


class ClonedRbd(Rbd):
    def recover(self, time: str) -> str:
        clone = f"{self.name}-again"
        snapshot = f"{POOL}/{self.name}@{time}"
        self._ceph.admin("rbd", "snap", "protect", snapshot)
        self._ceph.admin("rbd", "clone", snapshot, f"{POOL}/{clone}")
        return self._start(RbdNbd(self._folder, self._ceph, clone)).uri()


@pytest.mark.parametrize(("features", "recovery"), [("", Rbd), ("layering", ClonedRbd)])
def test_snapshots(
    start: Start, folder: Path, ceph: Ceph, features: str, recovery: type[Rbd]
) -> None:
    """Also without `exclusive-lock`, with which the client that makes the snapshot asks the one
    that writes."""
    options = [f"--image-feature={features}"] if features else []
    try_storage(start, folder, recovery(start, folder, ceph, *options))
