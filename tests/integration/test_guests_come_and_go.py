"""Guests that come and go, all eight threads of each at work, leave the server's memory, threads
and descriptors flat. So do guests that vanish with requests in flight, and guests that are there
when the server ends.

nbdkit before 1.34 aborts when a guest vanishes while replies of two threads wait for it, whatever
its plugin. There the guests that vanish have one thread each.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest
from support.fixtures import Start
from support.images import KiB, MiB, assert_identical, make_image
from support.processes import nbdkit_version, resources, settled
from support.seeds import SEED, print_seed
from support.servers import Nbdmirror
from support.waiting import STOP_S_MAX

THREADS = 8
CONNECTS = 1000
GROWTH_BYTES_MAX = 2 * MiB
"""Kept thread states that are not given back are 5 to 10 KB a thread: 40 to 80 MB a thousand."""

VANISHING_THREADS = THREADS if nbdkit_version() >= (1, 34) else 1


class Thrifty(Nbdmirror):
    """Its allocator keeps no large buffers of threads that have ended, so that what grows is not
    the allocator."""

    def environment(self) -> dict[str, str]:
        thrift = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(64 * KiB)}
        return super().environment() | thrift


class Guest:
    """One connection with `THREADS` reads in flight. They end with `finish`, or with the
    connection."""

    def __init__(self, uri: str, length: int = 64 * KiB) -> None:
        self.handle = nbd.NBD()
        self.handle.connect_uri(uri)
        self._buffers = [nbd.Buffer(length) for _ in range(THREADS)]
        self._cookies = [
            self.handle.aio_pread(buffer, number * length)
            for number, buffer in enumerate(self._buffers)
        ]

    def finish(self) -> None:
        """Wait for the replies, and write, so that each kind of request has been there."""
        for cookie in self._cookies:
            while not self.handle.aio_command_completed(cookie):
                self.handle.poll(-1)
        self.handle.pwrite(self.handle.pread(4 * KiB, 0), 0)
        self.handle.flush()


def vanish(uri: str) -> None:
    """The replies do not fit into the socket, so that threads are sending when it closes."""
    Guest(uri, length=MiB)


@pytest.fixture
def image(folder: Path) -> Path:
    print_seed()
    return make_image(folder / "disk.img", THREADS * MiB, SEED)


def serve(start: Start, folder: Path, image: Path, threads: int) -> Nbdmirror:
    server = start(Thrifty(folder, image, bare=True, nbdkit=("-t", str(threads))))
    # nbdkit says that a guest has gone, by pieces that other threads' pieces can part.
    server.allowed = ["nbdkit: python", r"^(python\S*: )?error: read request: "]
    return server


def check_flat(server: Nbdmirror, visits: int, visit: Callable[[], object]) -> None:
    """`visit` again and again leaves nothing behind, after half as many to warm up. What leaks does
    so in each of three rounds; an allocator that takes one more piece does so in one."""
    _, threads, descriptors = resources(server.pid)
    for _ in range(visits // 2):
        visit()
    grown: list[int] = []
    while not grown or (len(grown) < 3 and grown[-1] >= GROWTH_BYTES_MAX):
        before = settled(server.pid, threads, descriptors)
        for _ in range(visits):
            visit()
        grown.append(settled(server.pid, threads, descriptors) - before)
    assert grown[-1] < GROWTH_BYTES_MAX, f"{[one // visits for one in grown]} bytes a visit"


@pytest.mark.guarantee("A thousand guests or mirrors leave nothing behind")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("threads", [1, THREADS])
def test_a_thousand_guests_one_after_another(
    start: Start, folder: Path, image: Path, threads: int
) -> None:
    """Every third goes without a good-bye."""
    server = serve(start, folder, image, threads)
    numbers = itertools.count()

    def visit() -> None:
        guest = Guest(server.uri())
        guest.finish()
        if next(numbers) % 3:
            guest.handle.shutdown()

    check_flat(server, CONNECTS, visit)


@pytest.mark.timeout(120)
def test_guests_that_vanish_with_requests_in_flight(
    start: Start, folder: Path, image: Path
) -> None:
    server = serve(start, folder, image, VANISHING_THREADS)
    check_flat(server, 200, lambda: vanish(server.uri()))


@pytest.mark.guarantee("A thousand guests or mirrors leave nothing behind")
@pytest.mark.timeout(120)
def test_many_guests_hang_up_at_once(start: Start, folder: Path, image: Path) -> None:
    """A host goes down with all of its guests: some say good-bye, some do not."""
    server = serve(start, folder, image, VANISHING_THREADS)
    noise = random.Random(SEED)

    def visit() -> None:
        guests = [Guest(server.uri(), noise.choice((64 * KiB, MiB))) for _ in range(40)]
        for guest in noise.sample(guests, 20):
            guest.finish()
        guests.clear()

    check_flat(server, 10, visit)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_while_guests_are_connected(
    start: Start, folder: Path, image: Path, how: signal.Signals
) -> None:
    """Idle ones, ones with requests in flight, and ones that hang up at that moment."""
    copy = folder / "copy.img"
    copy.write_bytes(image.read_bytes())
    for _ in range(5):
        server = serve(start, folder, image, VANISHING_THREADS)
        guests = [Guest(server.uri(), 16 * KiB) for _ in range(24)]
        for guest in guests[:8]:
            guest.finish()
        assert server.process is not None
        server.process.send_signal(how)
        del guests[4:12]  # of both kinds; `guest` is another one
        assert server.process.wait(STOP_S_MAX) == 0, server.stderr
        server.stop()
    assert_identical(image, copy)
