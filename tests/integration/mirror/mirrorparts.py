"""What the tests of a mirror from end to end have in common: events in QEMU's order, and targets
that no one here wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.images import KiB, MiB, make_noise, make_qcow2
from support.serverprocess import Server
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd, QsdTarget

SIZE = 12 * MiB
SLOW: dict[str, Any] = {"speed": 256 * KiB, "buf_size": 64 * KiB}
"""A job that does not get done before the test has seen it run; with a guest that dirties faster
it never would, as in QEMU."""

STARTED = ["created", "running", "return"]
READY = ["ready", "BLOCK_JOB_READY"]
ENDED_WELL = ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
ENDED_CANCELLED = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]


def qemu_nbd_raw(folder: Path, size: int) -> Server:
    return QemuNbd(folder, make_noise(folder / "target.img", size))


def qemu_nbd_qcow2(folder: Path, size: int) -> Server:
    return QemuNbd(folder, make_qcow2(folder / "target.qcow2", size), "qcow2")


def qemu_nbd_qcow2_2m(folder: Path, size: int) -> Server:
    image = make_qcow2(folder / "target.qcow2", size, "-o", "cluster_size=2M")
    return QemuNbd(folder, image, "qcow2")


def storage_daemon(folder: Path, size: int) -> Server:
    return QsdTarget(folder, make_noise(folder / "target.img", size))


def nbdkit_memory(folder: Path, size: int) -> Server:
    return NbdkitTarget(folder, "memory", str(size))


def nbdkit_file(folder: Path, size: int) -> Server:
    return NbdkitTarget(folder, "file", f"file={make_noise(folder / 'target.img', size)}")


def nbdkit_without_extras(folder: Path, size: int) -> Server:
    """No zero, no extents: what is missing is emulated or done without."""
    image = make_noise(folder / "target.img", size)
    filters = ("nozero", "noextents", "fua")
    return NbdkitTarget(folder, "file", f"file={image}", "fuamode=emulate", filters=filters)


def nbdkit_4096(folder: Path, size: int) -> Server:
    """Refuses whatever is not aligned to 4096."""
    policy = ("blocksize-minimum=4096", "blocksize-error-policy=error", "blocksize-maximum=1M")
    return NbdkitTarget(folder, "memory", str(size), *policy, filters=("blocksize-policy",))


def nbdmirror_itself(folder: Path, size: int) -> Server:
    return Nbdmirror(folder, make_noise(folder / "target.img", size))


TARGETS: dict[str, Callable[[Path, int], Server]] = {
    "qemu-nbd": qemu_nbd_raw,
    "qcow2": qemu_nbd_qcow2,
    "qcow2-2m": qemu_nbd_qcow2_2m,
    "qsd": storage_daemon,
    "memory": nbdkit_memory,
    "file": nbdkit_file,
    "plain": nbdkit_without_extras,
    "4096": nbdkit_4096,
    "nbdmirror": nbdmirror_itself,
}
