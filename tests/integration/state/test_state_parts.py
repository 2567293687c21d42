"""After a kill of the server the parts that the target's storage lacks are sent again, and little
else: neither whole granules, nor what was flushed."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from contextlib import suppress
from pathlib import Path

import nbd
import pytest
from integration.rules.rulesparts import Logged
from integration.state.stateparts import restart_until_ready
from support.clients import connected, connections
from support.fixtures import Identical, Start
from support.images import KiB, MiB, make_empty
from support.kept import Kept
from support.processes import freeze
from support.seeds import SEED, print_seed
from support.waiting import wait_until

SIZE = 128 * MiB
BLOCK = 4 * KiB
WRITES_A_SECOND = 500
"""At most. Far fewer than may be between two flushes: with more, an older remainder stays."""
KILLS = 3
RATIO_MAX = 1.5
BLOCKS = 32


class Writer:
    """A guest that writes blocks at random places, one after the other, until its server ends. What
    it could not do in time it leaves: a burst would be more than is between two flushes."""

    def __init__(self, uri: str, places: list[int], seed: int) -> None:
        self.writes = 0
        self._uri, self._places, self._rng = uri, places, random.Random(seed)
        self._pause = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_for(self, writes: int) -> None:
        wait_until(lambda: self.writes >= writes or not self._thread.is_alive(), "it writes")

    def join(self) -> None:
        self._thread.join(30)

    def _run(self) -> None:
        with suppress(nbd.Error), connected(self._uri) as handle:
            while True:
                handle.pwrite(self._rng.randbytes(BLOCK), self._rng.choice(self._places))
                self.writes += 1
                self._pause.wait(1 / WRITES_A_SECOND)


def new_target(folder: Path) -> Logged:
    """With one thread a connection: with more, an nbdkit before 1.34 may end when its client is
    killed with requests in flight (docs/security.md)."""
    image = make_empty(folder / "target.img", SIZE)
    return Logged(folder, image, options=("--threads=1",))


def sent_bytes(lines: list[str]) -> int:
    return sum(length for _, length in writes(lines))


def writes(lines: list[str]) -> list[tuple[int, int]]:
    found = (re.search(r" Write id=\d+ offset=(\w+) count=(\w+)", line) for line in lines)
    return [(int(match[1], 0), int(match[2], 0)) for match in found if match]


def unflushed_bytes(source: Path, target: Logged) -> int:
    """Bytes in blocks that the target does not have, or has got since its last good flush began.
    Only while nothing is sent."""
    lines = target.log.read_text().splitlines()
    ended = [m[1] for line in lines if (m := re.search(r"\.\.\.Flush id=(\d+) return=0", line))]
    begun = [at for at, line in enumerate(lines) if re.search(rf" Flush id={ended[-1]}\b", line)]
    late = {
        block
        for offset, length in writes(lines[begun[0] :])
        for block in range(offset // BLOCK, -(-(offset + length) // BLOCK))
    }
    with source.open("rb") as one, target.image.open("rb") as other:
        for block in range(SIZE // BLOCK):
            if one.read(BLOCK) != other.read(BLOCK):
                late.add(block)
    return len(late) * BLOCK


@pytest.mark.guarantee("A mirror continues where it was")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("span", [SIZE, 4 * MiB], ids=["everywhere", "one place"])
def test_after_a_kill_only_parts_are_sent_again(
    start: Start, folder: Path, identical: Identical, span: int
) -> None:
    print_seed()
    rng = random.Random(SEED)
    disk = make_empty(folder / "disk.img", SIZE)
    target = start(new_target(folder))
    server = start(Kept(folder, disk))
    server.allowed.append(".*")  # nbdkit complains of guests that it ends on
    server.qmp.add_target("t", target)
    server.qmp.start_mirror("t", device="vda")
    server.qmp.wait_ready()
    again = lost = 0
    for number in range(KILLS):
        writer = Writer(server.uri(), list(range(0, span, BLOCK)), SEED + number)
        writer.wait_for(rng.randint(500, 1500))
        server.kill()
        writer.join()
        wait_until(lambda: not connections(target.socket), "the target has done what it was asked")
        lost += unflushed_bytes(disk, target)
        before = len(target.log.read_text().splitlines())
        restart_until_ready(server)
        again += sent_bytes(target.log.read_text().splitlines()[before:])

    assert 0 < again <= RATIO_MAX * lost, f"{again} bytes again, {lost} were not flushed"
    server.qmp.complete()
    server.stop()
    identical(disk, target.image)


def killed_behind_a_frozen_target(server: Kept, target: Logged) -> None:
    """A mirror that was ready is killed with blocks that the target has not got."""
    server.qmp.add_target("t", target)
    server.qmp.start_mirror("t", device="vda")
    server.qmp.wait_ready()
    changed = server.job_status
    with connected(server.uri()) as guest:
        for tried in range(100):  # parts are noted soon after READY
            guest.pwrite(bytes([tried + 1]) * BLOCK, 0)
            wait_until(lambda: not changed()["dirty-bytes"], "it is copied")
            if int(str(changed()["sent-bytes"])) % (64 * KiB):
                break
        wait_until(lambda: not changed()["unflushed-bytes"], "the target is flushed")
        freeze(target.pid)
        for number in range(BLOCKS):
            guest.pwrite(bytes([number + 1]) * BLOCK, number * MiB + 8 * KiB)
    server.kill()


def sent_by_the_next(server: Kept, target: Logged) -> int:
    os.kill(target.pid, signal.SIGCONT)
    before = len(target.log.read_text().splitlines())
    restart_until_ready(server)
    return sent_bytes(target.log.read_text().splitlines()[before:])


@pytest.fixture
def logged(start: Start, folder: Path) -> Logged:
    return start(new_target(folder))


@pytest.fixture
def parted(start: Start, folder: Path) -> Kept:
    server = start(Kept(folder, make_empty(folder / "disk.img", SIZE)))
    server.allowed.append(".*")
    return server


@pytest.mark.parametrize("kills", [1, 3])
def test_a_server_that_is_killed_again_at_once_sends_parts(
    identical: Identical, folder: Path, parted: Kept, logged: Logged, kills: int
) -> None:
    """The parts that one process has found are known to the next one, although nothing was sent and
    flushed in between."""
    killed_behind_a_frozen_target(parted, logged)
    for _ in range(kills - 1):
        parted.restart()
        parted.kill()
    sent = sent_by_the_next(parted, logged)
    assert BLOCKS * BLOCK <= sent <= RATIO_MAX * BLOCKS * BLOCK
    parted.stop()
    identical(folder / "disk.img", logged.image)


def test_memory_of_an_older_version_is_taken_up(
    identical: Identical, folder: Path, parted: Kept, logged: Logged
) -> None:
    """It has bitmaps, and no parts: so whole granules are sent."""
    killed_behind_a_frozen_target(parted, logged)
    memory = Path(str(parted.definition()["memory"]))
    for file in (memory / "recent", *memory.glob("remainder-*")):
        file.unlink()
    granules = BLOCKS * 64 * KiB
    assert granules <= sent_by_the_next(parted, logged) <= 2 * granules
    parted.stop()
    identical(folder / "disk.img", logged.image)
