"""Write-blocking mode under load, compared with qemu-storage-daemon where it can be, and changes of
the mode; endings under load."""

from __future__ import annotations

import contextlib
import operator
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.sync.syncparts import SIZE
from support.clients import connected
from support.fixtures import Identical
from support.guests import Guest
from support.images import KiB, assert_identical
from support.parity import assert_alike
from support.paritydifferences import PROGRESS
from support.paritysides import Setting, Side
from support.paritysteps import call, do, ready, status
from support.paritysteps import start as start_of_job
from support.qmpclient import Qmp
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

WRITES = 300
"""Of each writer, where they are to get into each other's way."""


def scribble(
    uri: str,
    number: int,
    stopping: threading.Event,
    counts: list[int],
    errors: list[BaseException],
) -> None:
    """Random writes over a quarter of the disk, the same quarter for all: they overlap."""
    noise = random.Random(number)
    try:
        with connected(uri) as guest:
            while not stopping.is_set():
                length = noise.choice((512, 4096, 65536, 100_000))
                offset = noise.randrange(0, SIZE // 4)
                if noise.random() < 0.15:
                    guest.zero(length, offset)
                else:
                    guest.pwrite(bytes([noise.randrange(256)]) * length, offset)
                counts[number] += 1
    except BaseException as error:  # noqa: BLE001 - the test looks at it
        errors.append(error)


@contextlib.contextmanager
def scribblers(uri: str, number: int = 4) -> Iterator[Callable[[int], None]]:
    """Gives a function that waits until each of them has written so many times more."""
    stopping, counts, errors = threading.Event(), [0] * number, list[BaseException]()
    threads = [
        threading.Thread(target=scribble, args=(uri, n, stopping, counts, errors), daemon=True)
        for n in range(number)
    ]

    def wait_for_more(times: int) -> None:
        goals = [count + times for count in counts]
        wait_until(
            lambda: errors or all(map(operator.ge, counts, goals)), f"{times} more writes of each"
        )

    for thread in threads:
        thread.start()
    try:
        yield wait_for_more
    finally:
        stopping.set()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), "a writer waits for ever"
    assert not errors, errors


@pytest.mark.rule(8, 12)
@pytest.mark.guarantee("Write-blocking")
@pytest.mark.parametrize("granularity", [512, 64 * KiB])
def test_overlapping_writers_in_write_blocking_mode(folder: Path, granularity: int) -> None:
    """Four connections, overlapping writes: no deadlock, and the images are equal (iotest 151's
    testIntersectingActiveIO)."""

    def load(side: Side) -> None:
        with scribblers(side.uri) as wait_for_more:
            wait_for_more(WRITES)

    ended = [do("block-job-cancel", device="j"), status("concluded")]

    def equal(side: Side) -> None:
        assert_identical(side.source_image, side.targets["tgt"][1])

    script: list[Any] = [
        start_of_job(copy_mode="write-blocking", granularity=granularity),
        [ready(), call("four writers for a while", load), ended],
        [call("equal", equal)],
    ]
    assert_alike(folder, Setting(), script, PROGRESS)


@pytest.mark.rule(11)
@pytest.mark.guarantee("Write-blocking")
@pytest.mark.parametrize("first", ["background", "write-blocking"])
def test_the_copy_mode_changes_under_load(
    identical: Identical, server: Nbdmirror, qmp: Qmp, target: QemuNbd, disk: Path, first: str
) -> None:
    """Both ways, again and again; back to background is an extension. Then the pivot, with the
    writers at work."""
    second = {"background": "write-blocking", "write-blocking": "background"}[first]
    qmp.start_mirror("tgt", device="src", copy_mode=first)
    qmp.wait_ready()
    with scribblers(server.uri("src")) as wait_for_more:
        for _ in range(5):
            for mode in (second, first):
                qmp.execute("block-job-change", id="j", type="mirror", copy_mode=mode)
                wait_for_more(10)
        qmp.execute("block-job-change", id="j", type="mirror", copy_mode="write-blocking")
        wait_until(lambda: qmp.job()["actively-synced"], "actively synced", 10)
        qmp.complete()
        before = disk.read_bytes()
        wait_for_more(10)
    assert disk.read_bytes() == before
    with connected(server.uri("src")) as guest:
        identical(bytes(guest.pread(SIZE, 0)), target.image)


def test_block_job_change_errors(qmp: Qmp) -> None:
    """8.2's texts."""
    change: dict[str, Any] = {"id": "j", "type": "mirror", "copy_mode": "write-blocking"}
    assert qmp.refusal("block-job-change", **change) == "Block job 'j' not found"
    for missing in change:
        rest = {key: value for key, value in change.items() if key != missing}
        name = missing.replace("_", "-")
        assert qmp.refusal("block-job-change", **rest) == f"Parameter '{name}' is missing"
    bogus = {**change, "copy_mode": "bogus"}
    text = "Parameter 'copy-mode' does not accept value 'bogus'"
    assert qmp.refusal("block-job-change", **bogus) == text
    qmp.start_mirror("tgt", device="src", auto_finalize=False, auto_dismiss=False)
    qmp.wait_ready()
    for mode in ("background", "write-blocking", "write-blocking", "background"):
        qmp.execute("block-job-change", **{**change, "copy_mode": mode})
    qmp.execute("block-job-complete", device="j")
    qmp.wait_for_event("BLOCK_JOB_PENDING", id="j")
    for state in ("pending", "concluded"):
        text = f"Job 'j' in state '{state}' cannot accept command verb 'change'"
        assert qmp.refusal("block-job-change", **change) == text
        if state == "pending":
            qmp.execute("job-finalize", id="j")


@pytest.mark.rule(42)
@pytest.mark.guarantee("Endings make progress under load")
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("ending", ["block-job-complete", "block-job-cancel"])
@pytest.mark.alone
def test_endings_under_heavy_load(
    server: Nbdmirror, qmp: Qmp, target: QemuNbd, disk: Path, ending: str, copy_mode: str
) -> None:
    """They come, and the guest is held for a moment at most."""
    qmp.start_mirror("tgt", device="src", copy_mode=copy_mode)
    qmp.wait_ready()
    with Guest(server.uri("src"), disk, connections=4, pause_s=0, length_max=200_000) as guest:
        guest.wait_for_requests(100)
        began_s = time.monotonic()
        qmp.execute(ending, device="j")
        assert "error" not in qmp.wait_for_event("BLOCK_JOB_COMPLETED", 15)
        assert time.monotonic() - began_s < 10
        guest.wait_for_requests(50)
    assert guest.longest_s < 3.0
    if ending == "block-job-complete":
        assert_identical(guest.model, target.image)
    assert_identical(guest.model, server.uri("src"))
