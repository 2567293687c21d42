"""What the tests of single rules are made of: targets that note each request, guests' requests that
may hang, and a mirror on its way."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from support.images import KiB, MiB
from support.paritysides import Faulty
from support.qmpclient import Qmp
from support.serverprocess import Server
from support.servers import NbdkitTarget, Nbdmirror
from support.waiting import wait_until

SIZE = 4 * MiB
GRANULE = 64 * KiB
CHANGED_TARGET = "came back changed"

both_modes = pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
both_endings = pytest.mark.parametrize("ending", ["block-job-complete", "block-job-cancel"])


Options = dict[str, Any]


class Logged(NbdkitTarget):
    """A raw file behind nbdkit, which notes every request before it does it."""

    def __init__(
        self,
        folder: Path,
        image: Path,
        *parameters: str,
        filters: tuple[str, ...] = (),
        options: tuple[str, ...] = (),
    ) -> None:
        self.log = folder / f"{image.name}.log"
        more = (f"file={image}", f"logfile={self.log}", *parameters)
        super().__init__(folder, "file", *more, filters=("log", *filters), options=options)
        self.image = image

    def requests(self, kind: str) -> list[tuple[int, int, bool]]:
        """Offset, length and FUA of each `Write`, `Zero` or `Flush` so far, in order."""
        found = []
        for line in self.log.read_text().splitlines():
            if match := re.search(rf" {kind} id=\d+(.*)", line):
                words = dict(re.findall(r"(\w+)=(\w+)", match[1]))
                place = int(words.get("offset", "0"), 0), int(words.get("count", "0"), 0)
                found.append((*place, words.get("fua") == "1"))
        return found


class LoggedFaulty(Faulty):
    """`Faulty`, which notes its requests as well."""

    def argv(self) -> list[str]:
        self.log = self.folder / f"faulty{self.number}.log"
        before, *rest = super().argv()
        return [before, "--filter=log", *rest, f"logfile={self.log}"]


def begin(
    server: Nbdmirror, target: Server, *, node: Options | None = None, **options: Any
) -> None:
    """A mirror of `src` on its way; `node`: options of the target's blockdev-add."""
    place = {"type": "unix", "path": str(target.socket)}
    server.qmp.execute("blockdev-add", driver="nbd", node_name="tgt", server=place, **(node or {}))
    server.qmp.start_mirror("tgt", device="src", **options)


def status_of(qmp: Qmp) -> dict[str, Any]:
    (job,) = qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
    return dict(job)


def wait_in_sync(qmp: Qmp) -> None:
    def is_so() -> bool:
        job = status_of(qmp)
        return not job["dirty-bytes"] + job["in-flight-bytes"]

    wait_until(is_so, "all is in sync", 10)


def wait_synced(qmp: Qmp, copy_mode: str) -> None:
    if copy_mode == "write-blocking":
        wait_until(lambda: qmp.job()["actively-synced"], "actively synced", 10)
    wait_in_sync(qmp)


def end(qmp: Qmp, ending: str) -> None:
    qmp.execute(ending, device="j")
    qmp.wait_completed()


def requests(logged: Logged) -> list[str]:
    """What the target was asked, without who came and went."""
    lines = logged.log.read_text().splitlines()
    return [line for line in lines if " count=" in line or " Flush" in line]


def guests(server: Nbdmirror) -> int:
    """How many are connected: the kernel's table names a socket's path at the server's side."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(line.endswith(f" {server.socket}") for line in lines) - 1  # the listening one


def cancel_by_force(qmp: Qmp) -> float:
    """Returns the seconds it took."""
    began_s = time.monotonic()
    qmp.execute("block-job-cancel", device="j", force=True)
    qmp.wait_for_event("BLOCK_JOB_CANCELLED", 5)
    return time.monotonic() - began_s
