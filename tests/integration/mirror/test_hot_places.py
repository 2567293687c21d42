"""What a guest changes all the time is copied last, with real servers: by the order of the writes
that reach the target."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.clients import connected
from support.fixtures import Identical, Start
from support.images import KiB, MiB, make_image, make_noise
from support.servers import NbdkitTarget, Nbdmirror
from support.waiting import wait_until

SIZE, GRANULE = 8 * MiB, 64 * KiB
HOT, CHANGED_ONCE = 2, range(16, 32)
"""Granules: the first ones are hot."""


@contextmanager
def changing(uri: str, granules: range) -> Iterator[None]:
    """A guest that changes these places all the time."""
    stopping = threading.Event()

    def run() -> None:
        with connected(uri) as handle:
            count = 0
            while not stopping.wait(0.01):
                count += 1
                for granule in granules:
                    handle.pwrite(bytes([count % 256]) * 512, granule * GRANULE)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(30)


def written(log: Path) -> list[int]:
    """The granules at which the writes begin, in order."""
    found = re.findall(r" Write id=\d+ offset=0x([0-9a-f]+) ", log.read_text())
    return [int(offset, 16) // GRANULE for offset in found]


def job_of(server: Nbdmirror) -> dict[str, Any]:
    (disk,) = server.qmp.execute("x-nbdmirror-query-status")["disks"]
    return dict(disk["jobs"][0])


def test_a_hot_place_is_sent_after_what_was_changed_once(
    start: Start, folder: Path, identical: Identical
) -> None:
    disk = make_noise(folder / "disk.img", SIZE)
    image, log = make_image(folder / "far.img", SIZE), folder / "log"
    more = {"filters": ("log",)}
    target = start(NbdkitTarget(folder, "file", str(image), f"logfile={log}", **more))
    server = start(Nbdmirror(folder, disk))
    with changing(server.uri(), range(HOT)):
        slow: dict[str, Any] = {"buf_size": GRANULE, "speed": 512 * KiB}
        server.qmp.start_mirror(target.uri(), granularity=GRANULE, **slow)
        wait_until(lambda: job_of(server)["written-bytes"] >= 3 * MiB, "a part is copied")
        with connected(server.uri()) as handle:
            for granule in CHANGED_ONCE:
                handle.pwrite(b"once" * 128, granule * GRANULE)
        server.qmp.execute("block-job-set-speed", device="j", speed=2 * MiB)
        last = SIZE // GRANULE - 1

        def after_the_first_round() -> list[int]:
            found = written(log)
            return found[found.index(last) + 1 :] if last in found else []

        wait_until(lambda: len(after_the_first_round()) > len(CHANGED_ONCE), "a second round")
    order = after_the_first_round()
    assert order[: len(CHANGED_ONCE)] == list(CHANGED_ONCE)
    assert order[len(CHANGED_ONCE)] < HOT
    server.qmp.wait_ready()
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    identical(disk, image)
