"""What a target only reads: to the byte what was written since it began, and nothing else."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from nbdmirror.devices.base import MemoryDevice, raw_device
from nbdmirror.disk import target_only as targetonly
from nbdmirror.disk.target_only import GRANULE_BYTES, TargetOnly
from nbdmirror.errors import DeviceError

OLD, NEW = b"o", b"n"


def old_side(size: int) -> TargetOnly:
    device = MemoryDevice(size)
    device.data[:] = OLD * size
    return TargetOnly(device, "nbd://b/vda")


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except DeviceError as error:
        refusal = error
    else:
        return False
    assert refusal.errno == errno.EPERM
    assert "target only, the disk is served from nbd://b/vda" in str(refusal)
    return True


def refuses(device: TargetOnly, offset: int, length: int) -> bool:
    buf = bytearray(length)
    answers = {
        is_refused(lambda: device.pread(memoryview(buf), offset)),
        is_refused(lambda: device.extents(offset, length)),
        is_refused(lambda: device.cache(offset, length)),
    }
    assert len(answers) == 1, "reads, block status and cache have one rule"
    assert OLD not in buf, "old data"
    return answers.pop()


@pytest.mark.parametrize("seed", range(6))
def test_all_that_was_written_and_nothing_else(seed: int) -> None:
    """Beside a model that has a flag a byte: ranges of all kinds, at all places."""
    rng = random.Random(seed)
    size = 12 * GRANULE_BYTES + rng.choice((0, 1, 511, 512, 4095))
    device, written = old_side(size), bytearray(size)
    for _ in range(400):
        unit = rng.choice((1, 512, GRANULE_BYTES))
        offset = rng.randrange(0, size, unit)
        length = min(rng.choice((1, 3, 512, 700, GRANULE_BYTES, 3 * GRANULE_BYTES)), size - offset)
        what = rng.choice(("write", "zero", "trim", "read", "read"))
        if what == "write":
            device.pwrite(NEW * length, offset)
        elif what == "zero":
            device.zero(offset, length, may_trim=rng.random() < 0.5)
        elif what == "trim" and all(written[offset : offset + length]):
            device.trim(offset, length)
        elif what == "read":
            assert refuses(device, offset, length) is not all(written[offset : offset + length])
        if what in ("write", "zero"):
            written[offset : offset + length] = b"\1" * length
        assert device.is_whole is all(written)


def test_a_trim_covers_nothing() -> None:
    device = old_side(3 * GRANULE_BYTES)
    device.trim(0, 3 * GRANULE_BYTES)
    assert refuses(device, 0, 1) and not device.is_whole


@pytest.mark.parametrize("step", [1, 512, 1000, GRANULE_BYTES, 5000])
def test_pieces_of_any_length_fill_it(step: int) -> None:
    size = 2 * GRANULE_BYTES + 77
    starts = list(range(0, size, step))
    random.Random(step).shuffle(starts)
    device = old_side(size)
    for start in starts:
        assert not device.is_whole
        device.pwrite(NEW * min(step, size - start), start)
    assert device.is_whole and not refuses(device, 0, size)


def test_a_write_that_fails_covers_nothing() -> None:
    device = old_side(GRANULE_BYTES)
    device.inner.read_only = True
    with pytest.raises(DeviceError):
        device.pwrite(NEW * GRANULE_BYTES, 0)
    assert refuses(device, 0, 1)


def test_too_many_pieces_are_forgotten_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targetonly, "EDGES_MAX", 8)
    device = old_side(GRANULE_BYTES)
    for start in range(0, 512, 2):
        device.pwrite(NEW, start)
    assert refuses(device, 0, 512)
    device.pwrite(NEW * GRANULE_BYTES, 0)
    assert device.is_whole


def test_nothing_is_whole_at_once() -> None:
    assert old_side(0).is_whole


def test_the_device_below_is_seen_through_it() -> None:
    device = old_side(512)
    assert raw_device(device) is device.inner
