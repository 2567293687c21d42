"""The NBD server, as libnbd's own calls see it: the corners of each request, and errnos."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import nbd
import pytest
from integration.serve.serveparts import SIZES
from support.clients import connected, nbd_errno
from support.fixtures import Start
from support.images import (
    KiB,
    MiB,
    allocated_bytes,
    assert_identical,
    make_empty,
    make_image,
    make_noise,
)
from support.mounts import mounted
from support.processes import patched
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd

NO_HOLE, FAST_ZERO, FUA = nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FUA


@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_the_last_byte(start: Start, folder: Path, size: int) -> None:
    image = make_noise(folder / "disk.img", size)
    server = start(Nbdmirror(folder, image))
    with connected(server.uri()) as guest:
        assert guest.get_size() == size
        guest.pwrite(b"Z", size - 1, FUA)
        assert image.read_bytes()[-1:] == b"Z"
        guest.zero(1, size - 1)
        assert guest.pread(1, size - 1) == b"\0"
        guest.pwrite(b"Z", size - 1)
        guest.trim(1, size - 1)
        assert bytes(guest.pread(1, size - 1)) in (b"\0", b"Z")
        guest.cache(size, 0)
        guest.flush()
    assert image.stat().st_size == size


def test_a_disk_of_no_bytes(start: Start, folder: Path) -> None:
    server = start(Nbdmirror(folder, make_empty(folder / "disk.img", 0)))
    server.allowed = ["out of range"]
    with connected(server.uri()) as guest:
        assert guest.get_size() == 0
        guest.flush()
        assert nbd_errno(guest.pread, 1, 0) == errno.EINVAL
        assert nbd_errno(guest.pwrite, b"x", 0) == errno.ENOSPC
        guest.flush()


def test_zeroes_with_and_without_holes(start: Start, folder: Path) -> None:
    image = make_noise(folder / "disk.img", 4 * MiB)
    expected = bytearray(image.read_bytes())
    server = start(Nbdmirror(folder, image))
    with connected(server.uri()) as guest:
        for offset, length, flags in (
            (0, MiB, NO_HOLE),
            (MiB, MiB, 0),
            (2 * MiB + 1, 4095, 0),
            (2 * MiB + 8000, 1, NO_HOLE | FUA),
            (3 * MiB + 511, 300_001, FUA),
        ):
            guest.zero(length, offset, flags)
            expected[offset : offset + length] = bytes(length)
        assert allocated_bytes(image) >= 2 * MiB, "NO_HOLE keeps its space"
        assert allocated_bytes(image) < 4 * MiB - MiB // 2, "a hole is punched where it may be"
        guest.trim(512 * KiB, 0)
        guest.flush()
    assert_identical(expected, image)
    assert allocated_bytes(image) < 3 * MiB, "trim gives space back"


def test_fast_zero_is_fast_or_refused_and_then_changes_nothing(start: Start, folder: Path) -> None:
    image = make_noise(folder / "disk.img", MiB)
    server = start(Nbdmirror(folder, image))
    server.allowed = [".*"]  # nbdkit tells of every refusal
    expected = bytearray(image.read_bytes())
    with connected(server.uri()) as guest:
        for offset, length, flags in ((0, 64 * KiB, 0), (100, 5000, 0), (128 * KiB, 4096, NO_HOLE)):
            code = nbd_errno(guest.zero, length, offset, FAST_ZERO | flags)
            assert code in (0, errno.EOPNOTSUPP)
            if not code:
                expected[offset : offset + length] = bytes(length)
    assert_identical(expected, image)


def extents(guest: nbd.NBD, length: int, offset: int, flags: int = 0) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []

    def collect(context: str, offset: int, entries: list[int], error: object) -> int:
        found.extend(zip(entries[::2], entries[1::2], strict=True))
        return 0

    guest.block_status(length, offset, collect, flags)
    return found


def test_block_status_covers_the_disk_and_req_one_is_one(start: Start, folder: Path) -> None:
    size = 3 * MiB + 1
    image = make_image(folder / "disk.img", size, 5)
    server = start(Nbdmirror(folder, image))
    whole = image.read_bytes()
    with connected(server.uri()) as guest:
        for flags in (0, nbd.CMD_FLAG_REQ_ONE):
            offset = 0
            while offset < size:
                found = extents(guest, size - offset, offset, flags)
                assert found
                assert len(found) == 1 or not flags
                for length, kind in found:
                    assert length > 0
                    if kind & nbd.STATE_ZERO:
                        assert not any(whole[offset : offset + length])
                    offset += length
        assert extents(guest, 1, size - 1, nbd.CMD_FLAG_REQ_ONE)[0][0] == 1


def test_out_of_range_is_refused_and_the_connection_goes_on(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    server.allowed = ["out of range"]
    before = disk.read_bytes()
    end = len(before)
    with connected(server.uri()) as guest:
        assert nbd_errno(guest.pread, 2, end - 1) == errno.EINVAL
        assert nbd_errno(guest.pread, 1, 1 << 62) == errno.EINVAL
        assert nbd_errno(guest.pwrite, b"xx", end - 1) == errno.ENOSPC
        assert nbd_errno(guest.zero, 2, end - 1) == errno.ENOSPC
        assert nbd_errno(guest.trim, 2, end - 1) == errno.EINVAL
        assert nbd_errno(guest.cache, 2, end - 1) == errno.EINVAL
        assert guest.pread(1, end - 1) == before[-1:]
    assert_identical(before, disk)


def test_a_read_only_disk_refuses_every_change(start: Start, disk: Path) -> None:
    before = disk.read_bytes()
    disk.chmod(0o444)
    server = start(Nbdmirror(disk.parent, disk, options=("--read-only",)))
    server.allowed = ["on readonly export|write protected|read.?only"]
    with connected(server.uri()) as guest:
        assert guest.is_read_only()
        for code in (
            nbd_errno(guest.pwrite, b"x", 0),
            nbd_errno(guest.zero, 512, 0),
            nbd_errno(guest.trim, 512, 0),
        ):
            assert code in (errno.EPERM, errno.EROFS)
        assert guest.pread(512, 0) == before[:512]
    assert_identical(before, server.uri())
    assert_identical(before, disk)


def test_an_unknown_export_is_refused_and_others_are_served(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, f"known={disk}"))
    server.allowed = [".*"]  # nbdkit prints the plugin's exception
    with pytest.raises(nbd.Error) as caught, connected(server.uri("nope")):
        pass
    assert caught.value.errnum == errno.ENOENT
    assert_identical(disk, server.uri("known"))


@pytest.mark.guarantee("Connections see one another's writes")
def test_connections_see_each_others_writes(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    with connected(server.uri()) as one, connected(server.uri()) as two:
        assert one.can_multi_conn()
        for number in range(50):
            data = random.Random(number).randbytes(4096)
            one.pwrite(data, number * 777)
            two.flush()
            assert two.pread(4096, number * 777) == data
            one, two = two, one


def test_requests_in_flight_are_answered_by_their_own_data(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    whole = disk.read_bytes()
    with connected(server.uri()) as guest:
        noise = random.Random(3)
        buffers: list[tuple[int, nbd.Buffer, int]] = []
        for _ in range(200):
            length = noise.randint(1, 20_000)
            offset = noise.randint(0, len(whole) - length)
            buffer = nbd.Buffer(length)
            buffers.append((offset, buffer, guest.aio_pread(buffer, offset)))
        for offset, buffer, cookie in buffers:
            while not guest.aio_command_completed(cookie):
                guest.poll(10_000)
            data = bytes(buffer.to_bytearray())
            assert data == whole[offset : offset + len(data)]


def test_the_largest_request(start: Start, folder: Path) -> None:
    image = make_empty(folder / "disk.img", 40 * MiB)
    server = start(Nbdmirror(folder, image))
    data = random.Random(1).randbytes(32 * MiB)
    with connected(server.uri()) as guest:
        guest.pwrite(data, 5)
        assert guest.pread(32 * MiB, 5) == data


# errno


@pytest.mark.guarantee("An errno arrives as it was")
@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EPERM"])
def test_an_nbd_sources_errno_reaches_the_guest(start: Start, folder: Path, name: str) -> None:
    errors = (f"error={name}", "error-rate=100%", f"error-file={folder}/now")
    behind = start(NbdkitTarget(folder, "memory", "1M", *errors, filters=("error",)))
    server = start(Nbdmirror(folder, behind.uri()))
    server.allowed = [".*"]
    with connected(server.uri()) as guest:
        guest.pwrite(b"before", 0)
        (folder / "now").touch()
        expected = getattr(errno, name)
        assert nbd_errno(guest.pwrite, bytes(512), 0) == expected
        assert nbd_errno(guest.pread, 512, 0) == expected
        assert nbd_errno(guest.trim, 512, 0) == expected
        assert nbd_errno(guest.zero, 512, 0) == expected
        (folder / "now").unlink()
        assert guest.pread(6, 0) == b"before"


@pytest.mark.guarantee("An errno arrives as it was")
def test_a_full_file_system_is_enospc_to_the_guest_and_can_be_relieved(folder: Path) -> None:
    with mounted("tmpfs", "size=1m") as place:
        image = make_empty(place / "disk.img", 4 * MiB)
        with Nbdmirror(folder, image) as server, connected(server.uri()) as guest:
            server.allowed = [".*"]
            data = random.Random(1).randbytes(256 * KiB)
            codes = [nbd_errno(guest.pwrite, data, n * 256 * KiB) for n in range(8)]
            assert codes[0] == 0 and set(codes) == {0, errno.ENOSPC}
            guest.trim(256 * KiB, 0)
            guest.pwrite(data, 256 * KiB)
            assert guest.pread(256 * KiB, 256 * KiB) == data


FAILING = """
import errno, os

def failing(call):
    def fail(*arguments):
        if os.path.exists({flag!r}):
            code = getattr(errno, open({flag!r}).read())
            raise OSError(code, os.strerror(code))
        return call(*arguments)
    return fail

os.preadv, os.pwrite, os.fdatasync = map(failing, (os.preadv, os.pwrite, os.fdatasync))
"""


class Failing(Nbdmirror):
    """nbdmirror whose disks fail with the errno whose name is in the file."""

    @property
    def flag(self) -> Path:
        return self.folder / "failing"

    def environment(self) -> dict[str, str]:
        return patched(super().environment(), self.folder, FAILING.format(flag=str(self.flag)))


@pytest.mark.guarantee("An errno arrives as it was")
@pytest.mark.parametrize(
    "name", ["ENODATA", "ENOLINK", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EUCLEAN", "EDQUOT", "ENOSPC"]
)
def test_an_error_that_nbd_has_no_number_for(start: Start, folder: Path, name: str) -> None:
    """A sector that cannot be read, a lost path, a file system that is gone: never EINVAL, as if
    the guest had asked for something that makes no sense. A mirror says whose error that is."""
    image = make_image(folder / "disk.img", MiB)
    target = start(QemuNbd(folder, make_empty(folder / "target.img", MiB)))
    server = start(Failing(folder, f"vda={image}"))
    server.allowed = [".*"]
    expected = errno.ENOSPC if name in ("EDQUOT", "ENOSPC") else errno.EIO
    with connected(server.uri()) as guest:
        server.flag.write_text(name)
        assert nbd_errno(guest.pread, 512, 0) == expected
        assert nbd_errno(guest.pwrite, bytes(512), 0) == expected
        assert nbd_errno(guest.flush) == expected
    server.qmp.start_mirror(target.uri(), device="vda")
    server.qmp.wait_for_event("BLOCK_JOB_COMPLETED")
    (disk,) = server.qmp.execute("x-nbdmirror-query-status")["disks"]
    why = f"{image}: cannot be read at 0: {os.strerror(getattr(errno, name))}"
    assert disk["last-job"]["reason"] == why
    server.flag.unlink()
