"""The NBD server, as clients see it that no one here wrote: nbdinfo, nbdcopy, qemu-img, qemu-io,
fio, and libnbd's own calls for the corners."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest
from clients import connected, nbd_errno
from fixtures import Start
from guests import Guest
from images import (
    KiB,
    MiB,
    allocated_bytes,
    assert_identical,
    make_empty,
    make_image,
    make_noise,
    make_qcow2,
)
from mounts import ON_DISK, loop_device, mounted
from processes import nbdmirror, run
from servers import NbdkitTarget, Nbdmirror, QemuNbd
from waiting import wait_until

SIZES = (0, 1, 511, 512, MiB, MiB + 1, 1025 * KiB)
NO_HOLE, FAST_ZERO, FUA = nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FUA
END_S_MAX = 5.0
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", 4 * MiB)


# Tools


def test_nbdinfo_tells_what_the_disk_can_do(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    told = json.loads(run("nbdinfo", "--json", server.uri()).stdout)
    export = told["exports"][0]
    assert told["structured"] is True
    assert export["export-size"] == 4 * MiB
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] >= 512
    can = [name for name in export if name.startswith("can_")]
    assert len(can) == 8
    for name in can:
        assert export[name] is True, name
    assert export["is_read_only"] is False
    assert export["contexts"] == ["base:allocation"]


def test_nbdinfo_lists_every_disk_and_the_first_is_the_default(start: Start, folder: Path) -> None:
    images = [make_image(folder / f"{n}.img", size, n) for n, size in enumerate((5000, 0, 700))]
    server = start(Nbdmirror(folder, f"sys={images[0]}", images[1], f"data.2={images[2]}"))
    told = json.loads(run("nbdinfo", "--list", "--json", server.uri()).stdout)
    sizes = {export["export-name"]: export["export-size"] for export in told["exports"]}
    assert sizes == {"sys": 5000, "disk1": 0, "data.2": 700}
    for export, image in zip(("", "disk1", "data.2"), images, strict=True):
        assert_identical(image, server.uri(export))


def test_nbdinfo_map_shows_the_holes(start: Start, folder: Path) -> None:
    image = make_empty(folder / "disk.img", MiB)
    with image.open("r+b") as file:
        file.seek(256 * KiB)
        file.write(b"d" * 128 * KiB)
    server = start(Nbdmirror(folder, image))
    told = json.loads(run("nbdinfo", "--map", "--json", server.uri()).stdout)
    found = [(extent["offset"], extent["length"], extent["type"]) for extent in told]
    tail = (384 * KiB, 640 * KiB, 3)
    assert found == [(0, 256 * KiB, 3), (256 * KiB, 128 * KiB, 0), tail]
    told = run("qemu-img", "map", "--output=json", "-f", "raw", server.uri()).stdout
    assert [extent["data"] for extent in json.loads(told)] == [False, True, False]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "cli"])
def test_nbdcopy_both_ways_at_any_size(start: Start, folder: Path, size: int, bare: bool) -> None:
    image = make_image(folder / "disk.img", size)
    fresh = make_noise(folder / "new.img", size)
    server = start(Nbdmirror(folder, image, f"new={fresh}", bare=bare))
    out = folder / "out.img"
    out.touch()
    run("nbdcopy", server.uri(), out)
    assert_identical(image, out)
    if size:  # nbdcopy 1.14 fails on an empty destination, whoever serves it
        run("nbdcopy", image, server.uri("new"))
    assert_identical(image, server.uri("new"))
    assert_identical(image, fresh)


def test_qemu_img_compares_and_converts(start: Start, disk: Path) -> None:
    folder = disk.parent
    back = make_noise(folder / "back.img", 4 * MiB)
    server = start(Nbdmirror(folder, disk, f"back={back}"))
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", disk, server.uri())
    qcow2 = folder / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri(), qcow2)
    run("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", qcow2, server.uri("back"))
    assert_identical(disk, back)


def test_qemu_io_patterns(start: Start, folder: Path) -> None:
    image = make_noise(folder / "disk.img", MiB)
    server = start(Nbdmirror(folder, image))
    steps = (
        "write -P 0xa5 1000 70000",
        "write -f -P 0x11 512 512",
        "write -z 8k 8k",
        "write -z -u 16k 4k",
        "discard 32k 4k",
        "flush",
        "read -P 0x11 512 512",
        "read -P 0 8k 12k",
        "read -P 0xa5 1024 7168",
        "read -P 0xa5 36k 34000",
    )
    words = [word for step in steps for word in ("-c", step)]
    said = run("qemu-io", "-f", "raw", *words, server.uri()).stdout
    assert "verification failed" not in said


@pytest.mark.parametrize("threads", ["1", None])
def test_fio_writes_and_verifies(start: Start, folder: Path, threads: str | None) -> None:
    image = make_empty(folder / "disk.img", 16 * MiB)
    options = ("--threads", threads) if threads else ()
    server = start(Nbdmirror(folder, image, options=options))
    said = run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri()}", "--rw=randwrite",
        "--bsrange=512-64k", "--bs_unaligned=1", "--size=16M", "--iodepth=16", "--verify=crc32c",
        "--verify_fatal=1", "--randseed=7", "--verify_state_save=0", "--output-format=json",
    ).stdout  # fmt: skip
    job = json.loads(said[said.index("{") :])["jobs"][0]
    assert job["error"] == 0 and job["read"]["io_bytes"] >= 8 * MiB


# libnbd, the corners


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
        assert guest.pread(1, size - 1) in (b"\0", b"Z")
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


# Sources


@pytest.mark.parametrize("connections", [1, 3])
def test_a_qcow2_behind_qemu_nbd(start: Start, folder: Path, connections: int) -> None:
    image = make_qcow2(folder / "disk.qcow2", 8 * MiB)
    behind = start(QemuNbd(folder, image, "qcow2"))
    server = start(Nbdmirror(folder, behind.uri()))
    with Guest(server.uri(), bytes(8 * MiB), connections=connections, pause_s=0) as guest:
        guest.wait_for_requests(600)
    assert_identical(guest.model, server.uri())
    assert_identical(guest.model, behind.uri())


@pytest.mark.parametrize("unit", [512, 4096])
def test_unaligned_requests_on_a_source_of_large_blocks(
    start: Start, folder: Path, unit: int
) -> None:
    policy = (f"blocksize-minimum={unit}", "blocksize-preferred=4096", "blocksize-maximum=32M")
    strict = (*policy, "blocksize-error-policy=error")
    behind = start(NbdkitTarget(folder, "memory", "4M", *strict, filters=("blocksize-policy",)))
    server = start(Nbdmirror(folder, behind.uri()))
    with connected(server.uri()) as handle:
        assert handle.get_block_size(nbd.SIZE_MINIMUM) == 1
    with Guest(server.uri(), bytes(4 * MiB), connections=3, pause_s=0) as guest:
        guest.wait_for_requests(600)
    assert_identical(guest.model, server.uri())
    assert_identical(guest.model, behind.uri())


def test_a_read_only_nbd_source(start: Start, disk: Path) -> None:
    behind = start(QemuNbd(disk.parent, disk, read_only=True))
    server = start(Nbdmirror(disk.parent, behind.uri(), options=("--read-only",)))
    server.allowed = ["on readonly export|write protected|read.?only"]
    assert_identical(disk, server.uri())
    with connected(server.uri()) as guest:
        assert guest.is_read_only()


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_block_device(folder: Path, cache: str) -> None:
    with tempfile.NamedTemporaryFile(dir=ON_DISK, suffix=".img") as file:
        image = make_image(Path(file.name), 4 * MiB)
        with loop_device(image) as device:
            with (
                Nbdmirror(folder, device, options=("--cache", cache)) as server,
                Guest(server.uri(), image, connections=2, pause_s=0) as guest,
            ):
                guest.wait_for_requests(300)
            assert_identical(guest.stop().model, Path(device))


def test_direct_io_takes_unaligned_requests(folder: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=ON_DISK, suffix=".img") as file:
        image = make_image(Path(file.name), 2 * MiB + 512)
        with (
            Nbdmirror(folder, image, options=("--cache", "none")) as server,
            Guest(server.uri(), image, connections=2, pause_s=0) as guest,
        ):
            guest.wait_for_requests(300)
        assert_identical(guest.stop().model, image)


# Life and end


def test_tcp(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk, tcp=True))
    assert_identical(disk, server.uri())


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "cli"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_client_connected(
    disk: Path, bare: bool, number: signal.Signals
) -> None:
    server = Nbdmirror(disk.parent, disk, bare=bare).start()
    try:
        process = server.process
        assert process is not None
        guest = nbd.NBD()
        guest.connect_uri(server.uri())
        guest.pwrite(b"last words", 0)
        process.send_signal(number)
        assert process.wait(END_S_MAX) == 0
        assert nbd_errno(guest.pread, 1, 0) != 0
        server.stop()
        assert disk.read_bytes()[:10] == b"last words"
        assert not server.qmp_path.exists()
    finally:
        server.kill()


def test_a_signal_ends_it_while_a_guest_writes(disk: Path) -> None:
    server = Nbdmirror(disk.parent, disk).start()
    try:
        writing = threading.Event()

        def write() -> None:
            with contextlib.suppress(nbd.Error), connected(server.uri()) as guest:
                while True:
                    guest.pwrite(bytes(4096), 0)
                    writing.set()

        threads = [threading.Thread(target=write, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert writing.wait(10)
        server.stop()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    finally:
        server.kill()


def test_quit_ends_it(disk: Path) -> None:
    with Nbdmirror(disk.parent, disk) as server:
        process = server.process
        assert process is not None
        assert server.qmp.execute("quit") == {}
        assert process.wait(END_S_MAX) == 0


@contextlib.contextmanager
def reaping() -> Iterator[None]:
    """The kernel gives us the daemons that our children leave, so that we can wait for them."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def daemon_folder(folder: Path) -> Iterator[Path]:
    """Kills what a failed test leaves running there."""
    yield folder
    pidfile = folder / "pid"
    if pidfile.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pidfile.read_text()), signal.SIGKILL)


def test_in_the_background(daemon_folder: Path) -> None:
    folder = daemon_folder
    disk, target = make_image(folder / "disk.img", 4 * MiB), make_noise(folder / "t.img", 4 * MiB)
    with reaping(), QemuNbd(folder, target) as behind:
        server = Nbdmirror(folder, disk)
        pidfile = folder / "pid"
        server.options = ("--daemonize", "--pidfile", str(pidfile))
        run(*server.argv())
        # nbdkit writes it after the parent has ended.
        wait_until(lambda: pidfile.exists() and pidfile.read_text(), "the pid file is written")
        pid = int(pidfile.read_text())
        wait_until(server.is_ready, "the daemon serves")
        with Guest(server.uri(), disk, pause_s=0) as guest:
            guest.wait_for_requests(100)
            # Its loop and its control endpoint live in the process that went into the background.
            nbdmirror_qmp = ("--qmp", server.qmp_path)
            done = nbdmirror("mirror", behind.uri(), "--wait", "completed", *nbdmirror_qmp)
            assert done.returncode == 0, done.stderr
            guest.wait_for_requests(100)
        assert_identical(guest.model, behind.uri())
        with connected(server.uri()) as idle:
            idle.pread(1, 0)
            os.kill(pid, signal.SIGTERM)
            assert wait_until(lambda: _exit_code(pid), "it ends", END_S_MAX) == "exit 0"
        pidfile.unlink(missing_ok=True)
        assert not server.qmp_path.exists()


def test_the_daemon_ends_with_status_0(daemon_folder: Path) -> None:
    folder = daemon_folder
    disk = make_image(folder / "disk.img", MiB)
    with reaping():
        server = Nbdmirror(folder, disk, bare=True)
        argv = [word for word in server.argv() if word != "-f"]
        run(argv[0], "-P", folder / "pid", *argv[1:])
        pidfile = folder / "pid"
        wait_until(lambda: pidfile.exists() and pidfile.read_text(), "the pid file is written")
        pid = int(pidfile.read_text())
        assert_identical(disk, server.uri())
        os.kill(pid, signal.SIGTERM)
        assert wait_until(lambda: _exit_code(pid), "it ends") == "exit 0"
        pidfile.unlink(missing_ok=True)


def _exit_code(pid: int) -> str:
    found, status = os.waitpid(pid, os.WNOHANG)
    return f"exit {os.waitstatus_to_exitcode(status)}" if found else ""


def test_the_control_socket_is_the_owners_alone(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    assert server.qmp_path.stat().st_mode & 0o777 == 0o600


def test_restart_on_the_same_sockets(disk: Path) -> None:
    """nbdkit leaves its socket file behind, and `serve` takes it over."""
    server = Nbdmirror(disk.parent, disk)
    for _ in range(2):
        with server:
            assert_identical(disk, server.uri())
    with server:  # killed: both sockets are stale
        server.kill()
    assert server.qmp_path.exists()
    with server:
        assert_identical(disk, server.uri())


def test_nothing_listens_but_what_was_asked_for(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    held = []
    for entry in Path(f"/proc/{server.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            held.append(os.readlink(entry))
    ours = {match[1] for name in held if (match := re.fullmatch(r"socket:\[(\d+)\]", name))}
    for table in ("tcp", "tcp6", "udp", "udp6"):
        path = Path(f"/proc/{server.pid}/net/{table}")
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        assert not ours & {line.split()[9] for line in lines}, table
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(server.qmp_path))
