"""One server for as long as a soak lasts: a guest that knows what it wrote, mirrors to and fro with
random commands and faults of their targets, and at each rest all compared and the process measured.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.guests import Guest
from support.images import KiB, MiB, assert_identical, make_image, make_noise
from support.kept import Kept
from support.late import started
from support.processes import resources
from support.proxy import Proxy
from support.qmpclient import Refused
from support.servers import QemuNbd
from support.waiting import WAIT_S_MAX, wait_until

SIZE = 16 * MiB
MIRRORS_A_STRETCH = 8
"""From one rest to the next."""
WARM_UP = 5
"""Rests that are not compared: pools and caches fill up."""
GROWTH_MAX = {"resident KiB": 48 * 1024, "threads": 2, "descriptors": 64}
"""What the end of a long run may have more than its beginning, at most. Sockets are a
saw-tooth: Python's collector closes some in its own time."""
END_S_MAX = 60.0

Figures = dict[str, int]


@dataclass
class Side:
    """Where the disk may be: a server, behind a link."""

    server: QemuNbd
    link: Proxy

    def heal(self) -> None:
        self.link.forward()
        if self.server.process is None:
            self.server.socket.unlink(missing_ok=True)
            self.server.start()


class Marathon:
    """`run` until told that it is over; raises AssertionError if anything is not as it must be."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.requests = 0
        self.compared_bytes = 0
        self.longest_s = 0.0
        self.rests: list[Figures] = []
        self._noise = random.Random(seed)
        disk = make_image(folder / "disk.img", SIZE, seed=seed)
        self._model = bytearray(disk.read_bytes())
        servers = [QemuNbd(folder, make_noise(folder / f"{n}.img", SIZE, seed + n)) for n in (1, 2)]
        self._sides = [Side(server.start(), Proxy(server.socket)) for server in servers]
        self._server = Kept(folder, disk)
        self._server.allowed.append(".*")  # it is told of many faults
        self._server.start()
        self._here: Side | None = None

    def run(self, is_over: Callable[[], bool]) -> None:
        try:
            while not is_over():
                self._stretch(is_over)
            self.assert_flat()
            self._server.stop()
        except BaseException:
            self._server.abandon()
            raise
        finally:
            for side in self._sides:
                side.link.close()
                side.server.abandon()

    def _stretch(self, is_over: Callable[[], bool]) -> None:
        seed = self._noise.randrange(1 << 30)
        guest = Guest(self._server.uri("vda"), self._model, seed=seed, connections=2, pause_s=0.01)
        with guest:
            for _ in range(MIRRORS_A_STRETCH):
                if not is_over():
                    self._mirror()
                    guest.wait_for_requests(20)
        self._model = guest.model
        self.requests += guest.requests
        self.longest_s = max(self.longest_s, guest.longest_s)
        assert_identical(self._model, self._server.uri("vda"))
        self.compared_bytes += SIZE
        if self._here is not None:
            assert_identical(self._model, self._here.server.image)
            self.compared_bytes += SIZE
        resident, threads, descriptors = resources(self._server.pid)
        self.rests.append(
            {"resident KiB": resident // KiB, "threads": threads, "descriptors": descriptors}
        )
        self._server.qmp.forget()

    # A mirror to another side, whatever comes in between.

    def _mirror(self) -> None:
        noise = self._noise
        target = noise.choice([side for side in self._sides if side is not self._here])
        options: dict[str, Any] = {
            "copy_mode": noise.choice(("background", "background", "write-blocking")),
            "on_target_error": noise.choice(("report", "stop", "ignore", "enospc")),
            "x_nbdmirror_reconnect_delay": noise.choice((0, 20)),
            "granularity": noise.choice((4 * KiB, 16 * KiB, 64 * KiB)),
            "speed": noise.choice((0, 0, 16 * MiB)),
            "buf_size": noise.choice((0, 64 * KiB, 4 * MiB)),
        }
        # Of one that was cancelled by force the target may have something to answer yet.
        started(lambda: self._server.qmp.start_mirror(target.link.uri, device="vda", **options))
        for _ in range(noise.randint(0, 5)):
            time.sleep(noise.random() ** 3 * 0.3)
            noise.choice((self._command, self._command, self._fault))(target)
        target.heal()
        self._end(target, noise.choice(("complete", "complete", "cancel", "cancel by force")))

    def _command(self, _target: Side) -> None:
        noise, mode = self._noise, ("background", "write-blocking")
        name, arguments = noise.choice(
            (
                ("block-job-pause", {}),
                ("block-job-resume", {}),
                ("block-job-set-speed", {"speed": noise.choice((0, 8 * MiB, 64 * MiB))}),
                ("block-job-change", {"type": "mirror", "copy_mode": noise.choice(mode)}),
            )
        )
        self._try(name, **{"id" if name == "block-job-change" else "device": "j"}, **arguments)
        bitmap = {"node": "vda", "name": "b"}
        self._try(f"block-dirty-bitmap-{noise.choice(('add', 'clear', 'remove'))}", **bitmap)
        self._server.qmp.execute("query-block-jobs")

    def _try(self, command: str, **arguments: Any) -> bool:
        """Whether it was not refused, which depends on what state all is in."""
        try:
            self._server.qmp.execute(command, **arguments)
        except Refused:
            return False
        self.done[command] += 1
        return True

    def _fault(self, target: Side) -> None:
        what = self._noise.choice(("reset", "half close", "stall", "kill", "return"))
        if what == "reset":
            target.link.reset()
        elif what == "half close":
            target.link.half_close()
        elif what == "stall":
            target.link.stall()
        elif what == "kill" and target.server.process is not None:
            target.server.kill()
        else:
            target.heal()
        self.done[f"target: {what}"] += 1

    def _end(self, target: Side, how: str) -> None:
        qmp = self._server.qmp
        self._try("block-job-set-speed", device="j", speed=0)
        if how == "cancel by force":
            self._try("block-job-cancel", device="j", force=True)
        elif self._is_brought_to_ready():
            self._until(
                lambda: self._try(f"block-job-{how}", device="j") or not self._job(),
                f"{how} is accepted",
            )
        self._until(lambda: not self._job(), "the job ends")
        (disk,) = qmp.execute("query-block")
        if disk["inserted"]["file"] == target.link.uri:
            self._here = target
            how = "pivot"
        self.done[f"ended by {how}"] += 1
        for node in qmp.execute("query-named-block-nodes"):  # what the disk was, for one
            with contextlib.suppress(Refused):
                qmp.execute("blockdev-del", node_name=node["node-name"])

    def _is_brought_to_ready(self) -> bool:
        """False if it has ended with an error."""
        self._until(lambda: not (job := self._job()) or job["ready"], "READY, or an error")
        return bool(self._job())

    def _job(self) -> dict[str, Any]:
        """{}: it has ended."""
        jobs = self._server.qmp.execute("query-block-jobs")
        return next((job for job in jobs if job["device"] == "j"), {})

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        """What is paused, or was stopped by an error, is resumed meanwhile."""

        def is_done() -> bool:
            if self._job().get("status") in ("paused", "standby"):
                self._try("block-job-resume", device="j")
            return condition()

        try:
            wait_until(is_done, what, END_S_MAX)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self._job()} {self._server.qmp.log[-8:]}") from error

    def assert_flat(self) -> None:
        """The last quarter of the rests has no more than the first one, as a rule (medians)."""
        compared = self.rests[WARM_UP:]
        quarter = len(compared) // 4
        if not quarter:
            return  # a short run
        for name, growth in GROWTH_MAX.items():
            earlier = statistics.median(figures[name] for figures in compared[:quarter])
            later = statistics.median(figures[name] for figures in compared[-quarter:])
            assert later <= earlier + growth, f"{name}: {earlier:.0f}, and later {later:.0f}"

    def report(self) -> list[str]:
        lines = [
            f"one server, mirrors         {sum(n for k, n in self.done.items() if 'ended' in k)}",
            *(f"  {what:26}{number}" for what, number in sorted(self.done.items())),
            f"  {'guest requests':26}{self.requests}",
            f"  {'longest request, ms':26}{self.longest_s * 1000:.0f}",
            f"  {'bytes compared':26}{self.compared_bytes}",
        ]
        for name in GROWTH_MAX if self.rests else ():
            values = [figures[name] for figures in self.rests]
            quarters = [values[len(values) * n // 4] for n in range(4)] + [values[-1]]
            lines.append(f"  {name + ', over time':26}{', '.join(map(str, quarters))}")
        return lines


class MarathonThread(threading.Thread):
    """A marathon beside something else. `error` is what it ended with."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(name="marathon", daemon=True)
        self.marathon = Marathon(folder, seed)
        self.error: BaseException | None = None
        self._stopping = threading.Event()

    def run(self) -> None:
        try:
            self.marathon.run(self._stopping.is_set)
        except BaseException as error:  # noqa: BLE001 - told by whoever has started it
            self.error = error

    def stop(self) -> None:
        self._stopping.set()
        self.join(END_S_MAX + 4 * WAIT_S_MAX)
        assert not self.is_alive(), "the marathon does not end"
