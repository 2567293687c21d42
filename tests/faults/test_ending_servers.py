"""A server that is ended in order answers each request with ESHUTDOWN, and waits for its clients to
leave (nbdkit, on SIGTERM). It is left for the server that comes after it, as one that was killed:
as a mirror's target and as a disk, on shared connections and on those of one thread."""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path
from typing import Self

import nbd
import pytest
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, make_image
from support.losing import end, start_mirror
from support.seeds import SEED
from support.servers import NbdkitTarget, Nbdmirror
from support.waiting import WAIT_S_MAX, wait_until

SIZE = 8 * MiB
COMPLETE = "block-job-complete"


class Ending(NbdkitTarget):
    """nbdkit with a file, which is ended in order while it has clients."""

    def end_and_come_back(self) -> None:
        process = self.process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: process.poll() is not None, "its clients leave, and the server ends")
        self.check_end(process.returncode)
        self.process = None
        self.socket.unlink(missing_ok=True)
        self.start()


class Readers:
    """Guests that only read: flushes may fail, since a server that ended may have lost writes."""

    def __init__(self, uri: str, image: Path, *, connections: int) -> None:
        self._data = image.read_bytes()
        self._uri = uri
        self._stopping = threading.Event()
        self._failures: list[BaseException] = []
        self.requests = 0
        self._threads = [
            threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(connections)
        ]

    def wait_for_requests(self, number: int) -> None:
        goal = self.requests + number
        wait_until(lambda: self.requests >= goal or self._failures, f"{number} guest requests")
        assert not self._failures, self._failures

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(WAIT_S_MAX)
            assert not thread.is_alive(), "a guest's request does not return"
        assert not self._failures, self._failures

    def _run(self, number: int) -> None:
        noise = random.Random(SEED + number)
        try:
            with connected(self._uri) as guest:
                while not self._stopping.is_set():
                    offset = noise.randrange(len(self._data) - 4096)
                    read = guest.pread(4096, offset)
                    assert read == self._data[offset : offset + 4096]
                    self.requests += 1
        except (AssertionError, nbd.Error) as error:
            self._failures.append(error)


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE, SEED)


@pytest.fixture
def image(folder: Path) -> Path:
    return make_image(folder / "target.img", SIZE, SEED + 1)


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("policy", ["report", "ignore"])
def test_a_target(
    start: Start, identical: Identical, disk: Path, image: Path, copy_mode: str, policy: str
) -> None:
    """The mirror goes on with the next server, with a reconnect-delay or if errors are ignored."""
    delay_s = 20 if policy == "report" else 0
    target = start(Ending(disk.parent, "file", str(image)))
    server = start(Nbdmirror(disk.parent, f"src={disk}", bare=True))
    with Guest(server.uri("src"), disk, seed=SEED, connections=2) as guest:
        options = {"on_target_error": policy, "copy_mode": copy_mode}
        qmp = start_mirror(server, target.uri(), reconnect_delay_s=delay_s, **options)
        qmp.wait_ready()
        guest.wait_for_requests(20)
        target.end_and_come_back()
        guest.wait_for_requests(50)
        end(qmp, COMPLETE)
    identical(guest, image)


@pytest.mark.parametrize("connections", [1, 9])
def test_a_disk(start: Start, image: Path, connections: int) -> None:
    """No request of a guest fails: those that are refused wait for the next server."""
    source = start(Ending(image.parent, "file", str(image)))
    options = ("--connections", str(connections))
    server = start(Nbdmirror(image.parent, f"src={source.uri()}", options=options))
    with Readers(server.uri("src"), image, connections=4) as guest:
        guest.wait_for_requests(200)
        source.end_and_come_back()
        guest.wait_for_requests(200)
    assert "Cannot send after" not in server.stderr


def test_the_source_of_a_mirror(
    start: Start, identical: Identical, disk: Path, image: Path
) -> None:
    """The event loop reads it meanwhile."""
    source = start(Ending(disk.parent, "file", str(disk)))
    target = start(NbdkitTarget(disk.parent, "file", str(image)))
    server = start(Nbdmirror(disk.parent, f"src={source.uri()}", bare=True))
    qmp = start_mirror(server, target.uri(), speed=2 * MiB)
    wait_until(lambda: qmp.job()["offset"] > 0, "the copy has begun")
    source.end_and_come_back()
    qmp.wait_ready()
    end(qmp, COMPLETE)
    identical(disk, image)
