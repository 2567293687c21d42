"""The lag that is told is never too small: an oracle stamps its writes, and reads what the target
has on its storage. The target forgets what it has not flushed, when it is killed.

At the moment that lies the lag before the question, all that had been answered by then must be in
the target's file when the answer is there.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import make_noise
from support.losing import SIZE, Lossy, end, start_mirror
from support.seeds import SEED
from support.servers import Nbdmirror
from support.waiting import wait_until

BLOCK = 4096
BLOCKS = SIZE // BLOCK
HOT_BLOCKS = 4
WRITES = 40

FORGETFUL = """
from nbdmirror.disk.backlog import Backlog
begin = Backlog.begin

def begin_forgetfully(self, dirty, claims, unflushed, flushing):
    begin(self, dirty, claims, type(unflushed)(unflushed.size, unflushed.granularity), flushing)
    self._flushes = []

Backlog.begin = begin_forgetfully
"""
"""What the target has, and not on its storage, counts as being there."""


class Mutant(Nbdmirror):
    """nbdmirror with FORGETFUL in it."""

    patches = FORGETFUL


class Oracle:
    """A guest that writes its writes' numbers. For each block it knows which write was answered
    when."""

    def __init__(self, uri: str, image: Path, seed: int) -> None:
        self.answered: list[tuple[float, int, int]] = []
        """When, the block, and the write's number; in the order of their answers."""
        self.samples = 0
        self.largest_s = 0.0
        self._uri, self._image = uri, image
        self._random = random.Random(seed)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> Oracle:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _write(self) -> None:
        with connected(self._uri) as guest:
            number = 0
            while not self._is_over.wait(0.002):
                number += 1
                among = HOT_BLOCKS if number % 2 else BLOCKS
                block = self._random.randrange(among)
                guest.pwrite(number.to_bytes(8, "little") * (BLOCK // 8), block * BLOCK)
                self.answered.append((time.monotonic(), block, number))

    def wait_for_writes(self, count: int = WRITES) -> None:
        target = len(self.answered) + count
        wait_until(lambda: len(self.answered) >= target, f"{count} writes more")

    def check(self, server: Nbdmirror) -> float:
        """One sample. Returns the lag."""
        assert self._thread.is_alive() or self._is_over.is_set(), "the guest has failed"
        asked_s = time.monotonic()
        job = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"][0]
        lag_s = float(job["lag-s"])
        content = self._image.read_bytes()
        newest = {block: number for at_s, block, number in self.answered if at_s <= asked_s - lag_s}
        for block, number in newest.items():
            start = block * BLOCK
            found = int.from_bytes(content[start : start + 8], "little")
            assert found >= number, (
                f"block {block}: write {number} is not on the target's storage, where write "
                f"{found} is, and the lag is said to be {lag_s} s"
            )
        self.samples += 1
        self.largest_s = max(self.largest_s, lag_s)
        return lag_s


@pytest.fixture
def disk(folder: Path) -> Path:
    """Of small numbers: they are older than all writes."""
    (folder / "disk.img").write_bytes(bytes(SIZE))
    return folder / "disk.img"


@pytest.fixture
def image(folder: Path) -> Path:
    return make_noise(folder / "target.img", SIZE, SEED + 1)


def watch(oracle: Oracle, server: Nbdmirror, count: int = WRITES) -> None:
    """Look at the lag all the time while the guest writes."""
    goal = len(oracle.answered) + count
    while len(oracle.answered) < goal:
        oracle.check(server)


@pytest.mark.guarantee("The reported lag is never too small")
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_the_lag_is_never_too_small(
    start: Start, identical: Identical, disk: Path, image: Path, copy_mode: str
) -> None:
    """Under load, while a flush takes its time, after one has failed, while the job is paused, and
    with a target that is killed and comes back."""
    target = start(Lossy(disk.parent, image))
    server = start(Nbdmirror(disk.parent, f"src={disk}", bare=True))
    qmp = start_mirror(server, target.uri(), copy_mode=copy_mode, on_target_error="ignore")
    qmp.wait_ready()
    with Oracle(server.uri("src"), image, SEED) as oracle:
        oracle.wait_for_writes()
        flushes = ("flush", 0, 0)
        for _ in range(2):
            mark = target.mark()
            while flushes not in target.requests(mark):
                watch(oracle, server)
        target.order("fail flush 1")
        while target.order_path.exists():
            watch(oracle, server)
        watch(oracle, server, 10 * WRITES)
        qmp.execute("job-pause", id="j")
        qmp.wait_status("standby")
        watch(oracle, server)
        qmp.execute("job-resume", id="j")
        watch(oracle, server)
        target.order("kill write 3")
        target.wait_killed()
        oracle.check(server)
        target.come_back()
        watch(oracle, server, 10 * WRITES)
        oracle.stop()
        wait_until(lambda: oracle.check(server) == 0, "all is on the target's storage")
    assert oracle.samples > 20
    assert image.read_bytes() == disk.read_bytes()
    end(qmp, "block-job-complete")
    identical(disk, image)


def test_the_test_is_able_to_fail(start: Start, disk: Path, image: Path) -> None:
    """The same with a server that takes for durable what is not flushed."""
    target = start(Lossy(disk.parent, image))
    server = start(Mutant(disk.parent, f"src={disk}", bare=True))
    qmp = start_mirror(server, target.uri())
    qmp.wait_ready()
    oracle = Oracle(server.uri("src"), image, SEED)
    with oracle, pytest.raises(AssertionError, match="is not on the target's storage"):
        watch(oracle, server, 100 * WRITES)
    end(qmp, "block-job-complete")
