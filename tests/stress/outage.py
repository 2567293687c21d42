"""A far side for points that is away for some time, while a guest writes 4 KiB blocks at a fixed
rate, and a neighbour does the same on a disk without a mirror.

What the guest notices is compared with what it noticed before. Other work on the machine slows it
too: how much is seen by the neighbour. Times may be asserted here, and nowhere else in the tests.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from integration.mirror.points.pointsparts import FarSide, left_bytes, recovered
from stress.fioload import FioLoad
from support.clients import connected
from support.images import KiB, MiB
from support.processes import freeze, resources
from support.servers import Nbdmirror
from support.waiting import WAIT_S_MAX

OUTAGE_S = float(os.environ.get("NBDMIRROR_OUTAGE_S", "20"))
BEFORE_S = max(10.0, OUTAGE_S / 4)
AFTER_S = 10.0
WARM_UP_S = 2.0
IOPS = 1000
BLOCK = 4 * KiB
LOOK_S = 0.25
PROBE_BYTES = 32 * MiB
"""Written while the job is paused, every other block, to see how fast a point goes."""

OPTIONS = (
    "--rw=randwrite", "--random_distribution=zipf:1.2", f"--bs={BLOCK}", "--iodepth=4",
    "--thinktime=0", f"--rate_iops={IOPS}", "--refill_buffers",
)  # fmt: skip
"""Of fio."""


@dataclass
class Figures:
    """What an outage cost."""

    p999_s: dict[str, float] = field(default_factory=dict)
    neighbour_p999_s: dict[str, float] = field(default_factory=dict)
    resident_bytes: dict[str, list[int]] = field(default_factory=dict)
    rate: float = 0.0
    """Bytes a second of a point, as measured before the outage."""
    backlog_bytes: int = 0
    first_point_s: float = 0.0
    """From the far side's return to the next point, which may have been cut before the outage."""
    whole_point_s: float = 0.0
    """From the far side's return to the first point that was cut since."""

    @property
    def unrest(self) -> float:
        """How much slower the neighbour's requests were at one time than at another."""
        found = self.neighbour_p999_s.values()
        return max(found) / min(found)

    @property
    def point_s_max(self) -> float:
        return self.backlog_bytes / self.rate + 2

    def lines(self) -> Iterator[str]:
        for when, seconds in self.p999_s.items():
            low, high = (of(self.resident_bytes[when]) / MiB for of in (min, max))
            yield (
                f"{when}: p99.9 {seconds * 1e3:.2f} ms, of the neighbour "
                f"{self.neighbour_p999_s[when] * 1e3:.2f} ms, memory {low:.1f} to {high:.1f} MiB"
            )
        yield (
            f"backlog {self.backlog_bytes / MiB:.1f} MiB at {self.rate / MiB:.1f} MiB/s; next "
            f"point after {self.first_point_s:.2f} s, with everything after "
            f"{self.whole_point_s:.2f} s of {self.point_s_max:.2f} s"
        )


class Outage:
    """The far side goes and returns: all of it stops, or ends, or its journal alone stops."""

    def __init__(self, server: Nbdmirror, far: FarSide, neighbour: Nbdmirror) -> None:
        self.server, self.far, self.neighbour = server, far, neighbour
        self.figures = Figures()

    def go_through(self, kind: str) -> None:
        go, come = self._kinds()[kind]
        self.figures.rate = self._measured_rate()
        with contextlib.ExitStack() as stack:
            loads = [
                stack.enter_context(FioLoad(one.folder / f"load-{one.number}", one.uri(), OPTIONS))
                for one in (self.server, self.neighbour)
            ]
            time.sleep(WARM_UP_S)
            times = {"before": self._look("before", BEFORE_S)}
            go()
            times["during"] = self._look("during", OUTAGE_S)
            self.figures.backlog_bytes = left_bytes(self.server)
            self.server.qmp.forget()
            come()
            self._time_points(time.time())
            times["after"] = self._look("after", AFTER_S)
            latencies = (self.figures.p999_s, self.figures.neighbour_p999_s)
            for load, found in zip(loads, latencies, strict=True):
                load.stop()
                found.update({when: load.p999_s(*time_) for when, time_ in times.items()})

    def recovered(self) -> Path:
        """From copies of the far side's files, after a point that is made now."""
        qmp = self.server.qmp
        point = qmp.execute("x-nbdmirror-point", id="j", wait=True)
        self._pause()  # so that both files are of one moment
        found = recovered(self.far.image, self.far.journal, "--point", str(point["sequence"]))
        qmp.execute("block-job-resume", device="j")
        qmp.wait_status("ready")
        return found

    def _pause(self) -> None:
        self.server.qmp.execute("block-job-pause", device="j")
        self.server.qmp.wait_status("standby")

    def _kinds(self) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
        both = (self.far.image_server, self.far.journal_server)
        journal = both[1:]

        def stop(servers: Any) -> None:
            for one in servers:
                freeze(one.pid)

        def proceed(servers: Any) -> None:
            for one in servers:
                os.kill(one.pid, signal.SIGCONT)

        def kill() -> None:
            for one in both:
                one.kill()

        def start() -> None:
            for one in both:
                one.start()

        return {
            "stopped": (lambda: stop(both), lambda: proceed(both)),
            "killed": (kill, start),
            "journal stopped": (lambda: stop(journal), lambda: proceed(journal)),
        }

    def _measured_rate(self) -> float:
        """Of a point of single blocks, which guests wrote while the job was paused."""
        qmp = self.server.qmp
        self._pause()
        with connected(self.server.uri()) as guest:
            for at in range(0, 2 * PROBE_BYTES, 2 * BLOCK):
                guest.pwrite(os.urandom(BLOCK), at)
        qmp.forget()
        qmp.execute("block-job-resume", device="j")
        point = qmp.wait_for_event("X_NBDMIRROR_POINT")
        assert point["bytes"] >= PROBE_BYTES
        return float(point["bytes"] / (time.time() - point["time-s"]))

    def _look(self, when: str, seconds: float) -> tuple[float, float]:
        """For so long, how much memory the server has; begin and end by time.time()."""
        start_s = time.time()
        found = self.figures.resident_bytes.setdefault(when, [])
        while time.time() < start_s + seconds:
            found.append(resources(self.server.pid)[0])
            time.sleep(LOOK_S)
        return start_s, time.time()

    def _time_points(self, back_s: float) -> None:
        qmp, longest_s = self.server.qmp, self.figures.point_s_max + WAIT_S_MAX
        point = qmp.wait_for_event("X_NBDMIRROR_POINT", longest_s)
        self.figures.first_point_s = time.time() - back_s
        while point["time-s"] < back_s:
            point = qmp.wait_for_event("X_NBDMIRROR_POINT", longest_s)
        self.figures.whole_point_s = time.time() - back_s
