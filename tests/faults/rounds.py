"""Rounds of trouble: a mirror with a state directory, something that is killed or cut at a random
moment, what a user then does, and what must hold.

A round is one `Cell` (what is hit, when, and whether the guest is busy) and a seed, which chooses
the rest (`Plan`) and can be replayed. It raises AssertionError if a write is lost, the wrong side
is served, more is sent again than may differ, or the two sides are not equal in the end.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from clients import connections
from images import Content, KiB, MiB, assert_identical, make_image, make_noise
from kept import Kept
from losing import Lossy, Range, add_target
from processes import nbdmirror_environment, patched
from proxy import Proxy
from qmpclient import Qmp
from serverprocess import Server
from servers import QemuNbd
from waiting import WAIT_S_MAX, wait_until
from witness import Witness

SIZE = 16 * MiB
GRANULE = 64 * KiB
REGION = MiB
"""Of the log of intents, for a disk of this size."""
ZONES = [(1 * MiB, 2 * MiB), (10 * MiB, 2 * MiB)]
"""Where the guest writes: a quarter of the disk, so that a full copy is told from less."""
PROBE, PROBE_OFFSET = Path(__file__).with_name("probe.py"), 14 * MiB
FIRST_COPY_BYTES_PER_S = 16 * MiB
RECONNECT_S = 20
ENDING_S = 0.06
"""What an ending takes at most, as a rule: the moments to choose from, most of them early."""
IN_FLIGHT_BYTES = 5 * MiB
"""What the copier has in flight at most, to a quick target."""

WHATS = ("guest", "server", "target", "link", "both")
PHASES = ("first copy", "READY", "completing", "pivoted")
GUESTS = ("idle", "busy")
TROUBLES = ("reset", "half close", "stall", "stall and reset")

STEPS = """
import os, signal
order = {order!r}
left = None

def counted(call, is_of_state):
    def wrapped(*arguments, **options):
        global left
        if left is None and os.path.exists(order):
            left = int(open(order).read())
        if left is not None and is_of_state(arguments, options):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return wrapped

def is_state_file(arguments, options):
    return "/state" in os.readlink(f"/proc/self/fd/{{arguments[0]}}")

def is_in_folder(arguments, options):
    return "dir_fd" in options or "src_dir_fd" in options

os.fsync = counted(os.fsync, is_state_file)
os.rename = counted(os.rename, is_in_folder)
os.unlink = counted(os.unlink, is_in_folder)
"""
"""The server kills itself before the step of that number that it does in its state directory, once
there is the file that says so."""
STEPS_MAX = 8
"""More than an ending has."""

QUICK_FLUSHES = "import nbdmirror.targetwatch\nnbdmirror.targetwatch.FLUSH_S = 0.15\n"
NOT_OURS = r"is not the disk any more: since .* it is served from (\S+) \("


@dataclass(frozen=True, slots=True)
class Cell:
    what: str
    phase: str
    guest: str

    def __str__(self) -> str:
        return f"{self.what}, {self.phase}, {self.guest}"


CELLS = [Cell(*cell) for cell in product(WHATS, PHASES, GUESTS)]
CALM = [Cell("nothing", phase, "busy") for phase in ("first copy", "READY")]
"""To compare the guest's waits with."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the seed has chosen."""

    target: str
    source: str
    is_over_tcp: bool
    is_power_cut: bool
    trouble: str
    first: str
    ending: str
    guest_goes_on: bool
    has_quick_flushes: bool
    is_ordered: bool
    """The forgetful target kills itself at one of its next requests."""
    is_write_blocking: bool
    step: int | None
    """At which step of an ending the server kills itself; None: it is killed at some moment."""
    looks_at_target_first: bool
    moment: float
    """From 0 to 1."""
    requests: int
    """Of the guest, before."""

    @classmethod
    def of(cls, cell: Cell, noise: random.Random) -> Plan:
        hits_server = cell.what in ("server", "both")
        is_power_cut = hits_server and noise.random() < 0.5
        is_lossy = noise.random() < 0.65
        return cls(
            target="lossy" if is_lossy else "qemu-nbd",
            source="lossy" if noise.random() < (0.4 if is_power_cut else 0.15) else "file",
            is_over_tcp=noise.random() < 0.25 or cell.what == "link",
            is_power_cut=is_power_cut,
            trouble=noise.choice(TROUBLES),
            first=noise.choice(("server", "target")),
            ending=noise.choice(("block-job-complete", "block-job-cancel")),
            guest_goes_on=noise.random() < 0.5,
            has_quick_flushes=noise.random() < 0.4,
            is_ordered=cell.what == "target" and is_lossy and noise.random() < 0.6,
            is_write_blocking=noise.random() < 0.2 and cell.what != "nothing",
            step=noise.choice((*range(STEPS_MAX), *(None,) * STEPS_MAX)),
            looks_at_target_first=noise.random() < 0.4,
            moment=noise.random(),
            requests=noise.randint(10, 120),
        )


@dataclass(frozen=True, slots=True)
class Waits:
    """What probe.py says."""

    requests: int
    longest_s: float
    over: int


@dataclass(slots=True)
class Outcome:
    cell: Cell
    seed: int
    plan: Plan
    again_bytes: int | None = None
    """Sent to the target again; None if the guest wrote meanwhile, or nothing was mirrored."""
    bound_bytes: int = 0
    had_pivoted: bool = False
    waits: Waits | None = None
    """Of a guest that does nothing else, from before the trouble until the target had caught up;
    where it is not to notice."""
    took_s: float = 0.0
    requests: int = 0
    """Of the guest."""
    compared_bytes: int = 0
    """Of two sides that must be equal, and what the guest has read."""
    hits: Counter[str] = field(default_factory=Counter)
    """Kind -> how often."""

    def __str__(self) -> str:
        again = "-" if self.again_bytes is None else f"{self.again_bytes // KiB} KiB"
        longest = f", longest request {self.waits.longest_s * 1000:.0f} ms" if self.waits else ""
        return (
            f"{self.cell} (seed {self.seed}): sent again {again} of at most "
            f"{self.bound_bytes // KiB} KiB{longest}; {self.plan}"
        )


class Mirror(Kept):
    """With no bugs of ours in what it says; nbdkit and the log speak of guests and targets lost."""

    unwanted = r"Traceback|CRITICAL|AssertionError|error in the event loop"
    patches = ""

    def environment(self) -> dict[str, str]:
        environment = nbdmirror_environment()
        return patched(environment, self.folder, self.patches) if self.patches else environment

    def memory(self) -> list[Path]:
        """The folders of memory that outlives it; of a process that runs."""
        maps = Path(f"/proc/{self.pid}/maps").read_text()
        return [Path(one) for one in set(re.findall(r"(/dev/shm/nbdmirror-state-\w+)/", maps))]

    def try_to_serve(self, disk: str) -> str:
        """Start with `disk`; why it refuses, or ""."""
        self.disks = [f"vda={disk}"]
        before = len(self.stderr)
        try:
            self.start()
        except AssertionError:
            return self.stderr[before:]
        return ""


@dataclass
class Round:
    folder: Path
    cell: Cell
    seed: int
    patches: str = ""
    """Code for the server's interpreter: a mutant."""
    chosen: dict[str, Any] = field(default_factory=dict)
    """Of the plan, in place of what the seed says."""
    _started: list[Server] = field(default_factory=list)
    _memory: set[Path] = field(default_factory=set)

    def run(self) -> Outcome:
        """Raises AssertionError, which tells how to replay it."""
        noise = random.Random(f"{self.cell} {self.seed}")
        self.plan = replace(Plan.of(self.cell, noise), **self.chosen)
        self.noise = noise
        self.outcome = Outcome(self.cell, self.seed, self.plan)
        began_s = time.monotonic()
        try:
            with self._world():
                self._play()
        except BaseException as error:
            error.add_note(f"replay: {self.cell}, seed {self.seed}; {self.plan}")
            raise
        outcome = self.outcome
        outcome.took_s = time.monotonic() - began_s
        outcome.requests = self.guest.requests
        outcome.compared_bytes += self.guest.read_bytes
        return outcome

    # What there is.

    @contextlib.contextmanager
    def _world(self) -> Iterator[None]:
        self.disk = make_image(self.folder / "disk.img", SIZE, self.seed)
        self.image = make_noise(self.folder / "target.img", SIZE, self.seed + 1)
        self.guest = Witness("", self.disk.read_bytes(), ZONES, self.seed)
        self.proxy: Proxy | None = None
        self.is_pivoted = False
        self.probe: subprocess.Popen[str] | None = None
        try:
            self._start_all()
            yield
            self.guest.stop()
            for server in reversed(self._started):
                server.stop()
        except BaseException:
            self.guest.abandon()
            for server in reversed(self._started):
                server.abandon()
            raise
        finally:
            if self.probe is not None:
                self.probe.kill()
                self.probe.communicate()
            if self.proxy is not None:
                self.proxy.close()
            for path in self._memory:
                shutil.rmtree(path, ignore_errors=True)

    def _start_all(self) -> None:
        plan = self.plan
        self.source: Lossy | None = None
        self.old_side = str(self.disk)
        if plan.source == "lossy":
            self.source = self._start(Lossy(self.folder, self.disk))
            self.old_side = self.source.uri()
        self.target: Lossy | QemuNbd
        if plan.target == "lossy":
            self.target = self._start(Lossy(self.folder, self.image))
        else:
            self.target = self._start(QemuNbd(self.folder, self.image))
        if plan.is_over_tcp:
            self.proxy = Proxy(self.target.socket)
        self.server = Mirror(self.folder, self.old_side)
        self.step_path = self.folder / "step"
        self.server.patches = STEPS.format(order=str(self.step_path)) + self.patches
        if plan.has_quick_flushes:
            self.server.patches += QUICK_FLUSHES
        self._start(self.server)
        self._memory.update(self.server.memory())
        self.guest.uri = self.server.uri()

    def _start(self, server: Any) -> Any:
        self._started.append(server)
        return server.start()

    @property
    def target_uri(self) -> str:
        return self.proxy.uri if self.proxy else self.target.uri()

    @property
    def qmp(self) -> Qmp:
        return self.server.qmp

    # The story.

    def _play(self) -> None:
        self.guest.start()
        self.guest.wait_for_requests(self.plan.requests)
        if self.cell.guest == "idle":
            self.guest.pause()
        self._reach_phase()
        is_measured = self.plan.guest_goes_on or self.cell.what == "nothing"
        if self._does_not_notice and self.cell.guest == "busy" and is_measured:
            self._start_probe()
        hit = {
            "guest": self._hit_guest,
            "server": self._hit_server,
            "target": self._hit_target,
            "link": self._hit_link,
            "both": self._hit_both,
            "nothing": self._hit_nothing,
        }[self.cell.what]
        hit()
        self._check_again()
        self._finish()

    def _reach_phase(self) -> None:
        phase, plan, qmp = self.cell.phase, self.plan, self.qmp
        add_target(qmp, self.target_uri, RECONNECT_S)
        qmp.start_mirror(
            "tgt",
            device="vda",
            granularity=GRANULE,
            on_target_error="report",
            speed=FIRST_COPY_BYTES_PER_S if phase == "first copy" else 0,
            copy_mode="write-blocking" if plan.is_write_blocking else "background",
        )
        if phase == "first copy":
            goal = int((0.1 + 0.7 * plan.moment) * SIZE)
            wait_until(lambda: qmp.job()["offset"] >= goal, "a part is copied")
            return
        qmp.wait_ready()
        if self.cell.guest == "idle":
            self._wait_caught_up()
            self.guest.touched.clear()  # the rest was flushed for READY
            self._rouse()
        if self.cell.what in ("server", "both") and plan.is_power_cut:
            self._have_it_saved()
        if self.cell.guest == "busy":
            self.guest.wait_for_requests(plan.requests)
        if phase == "pivoted":
            qmp.complete()
            self.is_pivoted = True
            self._rouse()

    def _rouse(self) -> None:
        """An idle guest writes a little now and then."""
        if self.cell.guest == "idle":
            self.guest.resume()
            self.guest.wait_for_requests(self.noise.randint(1, 10))
            self.guest.pause()
        else:
            self.guest.wait_for_requests(self.plan.requests)

    def _have_it_saved(self) -> None:
        """What is dirty is on disk twice: regions of before the first one have left the log."""
        for _ in range(2):
            self.qmp.execute("block-dirty-bitmap-add", node="vda", name="x", persistent=True)
            self.qmp.execute("block-dirty-bitmap-remove", node="vda", name="x")

    def _begin_to_complete(self) -> None:
        """Send the command, and be away at some moment of what follows."""
        if self.cell.phase != "completing":
            return
        is_stepwise = self.plan.step is not None and self.cell.what in ("server", "both")
        if is_stepwise:
            self.step_path.write_text(str(self.plan.step))
        self.qmp.socket.sendall(b'{"execute": "block-job-complete", "arguments": {"device": "j"}}')
        if is_stepwise:
            self._wait_over(self.server)
        else:
            time.sleep(self.plan.moment**3 * ENDING_S)

    # What is hit. Each ends with the guest paused, looked at, and the target level.

    def _hit_nothing(self) -> None:
        self.guest.wait_for_requests(120)
        self.guest.pause()
        self._catch_up()
        self._end_probe()

    def _hit_guest(self) -> None:
        """Another one looks at the disk when the server has noticed, and nothing is under way."""
        guest = self.guest
        lost_at = self._mark()
        guest.allows_lost_connection = True
        self._begin_to_complete()
        guest.vanish()
        self._count("guest killed")
        wait_until(lambda: not connections(self.server.socket), "the server lets the guest go")
        guest.allows_lost_connection = False
        if self.cell.phase == "completing":
            self._wait_pivoted()
        self._settle()
        self._catch_up()
        self._check_sent(lost_at)

    def _hit_server(self) -> None:
        self.guest.allows_lost_connection = True
        self._begin_to_complete()
        self._kill_server()
        self._serve_again()
        self._measure_since_start()

    def _hit_both(self) -> None:
        self.guest.allows_lost_connection = True
        self._begin_to_complete()
        order = [self._kill_server, self._kill_target]
        for kill in order if self.plan.first == "server" else reversed(order):
            kill()
        may_come_later = self.cell.phase in ("first copy", "READY") and self.plan.moment < 0.5
        if may_come_later:
            self._serve_again()
            self._target_comes_back()
        else:
            self._target_comes_back()
            self._serve_again()
        self._measure_since_start()

    def _hit_target(self) -> None:
        is_ordered = self.plan.is_ordered and (
            self.cell.phase in ("first copy", "completing") or self.cell.guest == "busy"
        )
        if is_ordered:
            assert isinstance(self.target, Lossy)
            self._storage_may_lose()
            kinds = ["flush", "write"] if self.cell.phase == "completing" else ["write"]
            kind = self.noise.choice(kinds)
            number = self.noise.randint(1, 2) if kind == "flush" else self.noise.randint(1, 6)
            self.target.order(f"kill {kind} {number}")
        self._begin_to_complete()
        if is_ordered and self.target.process is not None:
            self._wait_over(self.target)
        self._kill_target()
        self._live_without_target(self._target_comes_back)

    def _wait_over(self, server: Server) -> None:
        """Until it has killed itself as ordered. It may never: there were fewer such moments."""
        process = server.process
        assert process is not None
        deadline_s = time.monotonic() + 1
        while process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.01)

    def _hit_link(self) -> None:
        proxy, trouble = self.proxy, self.plan.trouble
        assert proxy is not None
        self._begin_to_complete()
        self._count(f"link: {trouble}")
        if trouble == "reset":
            proxy.reset()
        elif trouble == "half close":
            proxy.half_close()
        else:
            proxy.stall()

        def mend() -> None:
            if trouble == "stall and reset":
                proxy.reset()
            proxy.forward()

        self._live_without_target(mend)

    def _live_without_target(self, mend: Callable[[], None]) -> None:
        """The guest goes on; `mend`; the target gets what it has missed."""
        guest, plan = self.guest, self.plan
        is_busy = self.cell.guest == "busy"
        does_not_notice = self._does_not_notice
        guest.allows_lost_flush = self._target_may_be_disk
        if is_busy and does_not_notice:
            guest.wait_for_requests(60)
        if does_not_notice and not plan.guest_goes_on:
            guest.pause()
        before = self._offset()
        lost_at = self._mark()
        if not does_not_notice:
            time.sleep(plan.moment * 0.3)
        mend()
        if self.cell.phase == "completing":
            self._wait_pivoted()
        if is_busy and plan.guest_goes_on:
            guest.wait_for_requests(60)
        if not does_not_notice and is_busy:
            guest.wait_for_requests(20)  # those that waited for the target have been answered
        guest.pause()
        self._settle()
        self._catch_up()
        self._end_probe()
        if does_not_notice and not plan.guest_goes_on:
            self.outcome.again_bytes = self._offset() - before
        self._check_sent(lost_at)

    # Killing.

    def _kill_server(self) -> None:
        guest, plan = self.guest, self.plan
        guest.allows_lost_connection = True
        self._count("server's host, power cut" if plan.is_power_cut else "server killed")
        if plan.is_power_cut:
            if self.source is not None:
                guest.is_kept = False
                self.source.kill()
            self.server.kill()
            for path in self._memory:
                shutil.rmtree(path, ignore_errors=True)
            if self.source is not None:
                self.source.come_back()
        else:
            self.server.kill()
        guest.pause()
        guest.forget_connections()
        self.lost_at = self._mark()

    def _kill_target(self) -> None:
        self._storage_may_lose()
        is_lossy = isinstance(self.target, Lossy)
        self._count("target's host, power cut" if is_lossy else "target killed")
        self.target.kill()

    def _storage_may_lose(self) -> None:
        """If the target is the disk by now it loses what guests have not flushed."""
        if self._target_may_be_disk:
            self.guest.allows_lost_flush = True
            if isinstance(self.target, Lossy):
                self.guest.is_kept = False

    def _target_comes_back(self) -> None:
        if isinstance(self.target, Lossy):
            self.target.order_path.unlink(missing_ok=True)
            self.target.come_back()
        else:
            self.target.socket.unlink(missing_ok=True)
            self.target.start()

    # The user.

    def _serve_again(self) -> None:
        """Serve what was served; what it names if it refuses that. It is never both, or neither."""
        self.step_path.unlink(missing_ok=True)
        server, target = self.server, self.target_uri
        may_have_pivoted = self.cell.phase == "completing" or self.is_pivoted
        if may_have_pivoted and self.plan.looks_at_target_first:
            refused = server.try_to_serve(target)
            if refused:
                assert not self.is_pivoted, refused
                assert f"is of {self.old_side}, not of {target}" in refused, refused
                self._serve(self.old_side)
            else:
                server.stop()
                assert re.search(NOT_OURS, server.try_to_serve(self.old_side))
                self.is_pivoted = True
                self._serve(target)
        elif refused := server.try_to_serve(self.old_side):
            assert may_have_pivoted, refused
            match = re.search(NOT_OURS, refused)
            assert match and match[1].rstrip("/") == target.rstrip("/"), refused
            self.is_pivoted = True
            self._serve(target)
        else:
            assert not self.is_pivoted, "it serves the old side"
        self._memory.update(server.memory())
        self.guest.allows_lost_connection = False
        self._settle()

    def _serve(self, disk: str) -> None:
        refused = self.server.try_to_serve(disk)
        assert not refused, refused

    def _settle(self) -> None:
        """Look whether all that must be there is; then it is certain."""
        guest = self.guest
        guest.settle()
        guest.take_for_flushed()
        guest.is_kept = True
        guest.allows_lost_flush = False

    def _measure_since_start(self) -> None:
        """The guest rests: what is copied now is what is sent again."""
        self._catch_up()
        if not self.is_pivoted:
            self.outcome.again_bytes = self._offset()
        self._check_sent(self.lost_at)

    def _wait_pivoted(self) -> None:
        self.qmp.wait_completed()
        self.is_pivoted = True

    def _catch_up(self) -> None:
        if not self.is_pivoted:
            self.qmp.execute("block-job-set-speed", device="j", speed=0)
            self._wait_caught_up()

    def _wait_caught_up(self) -> None:
        left_bytes_max = GRANULE if self.probe else 0  # which the probe writes to again and again

        def is_level() -> bool:
            job = self.qmp.job()
            return bool(job["ready"] and job["len"] - job["offset"] <= left_bytes_max)

        wait_until(is_level, "the mirror has caught up")

    # What is measured.

    @property
    def _does_not_notice(self) -> bool:
        """The guest does not pay for the target's trouble."""
        is_mirror = self.cell.phase in ("first copy", "READY")
        is_of_target = self.cell.what in ("target", "link", "nothing")
        return is_mirror and is_of_target and not self.plan.is_write_blocking

    @property
    def _target_may_be_disk(self) -> bool:
        return self.cell.phase in ("completing", "pivoted")

    def _start_probe(self) -> None:
        self.guest.touched.append((PROBE_OFFSET, GRANULE))
        self.probe = subprocess.Popen(
            [sys.executable, str(PROBE), self.guest.uri, str(PROBE_OFFSET)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.probe.stdout is not None
        assert self.probe.stdout.readline() == "ready\n"

    def _end_probe(self) -> None:
        if self.probe is not None:
            said, _ = self.probe.communicate(timeout=WAIT_S_MAX)
            assert self.probe.returncode == 0, "the probe's requests failed"
            self.outcome.waits, self.probe = Waits(**json.loads(said)), None

    def _offset(self) -> int:
        if self.is_pivoted:
            return 0
        return next((int(j["offset"]) for j in self.qmp.execute("query-block-jobs")), 0)

    def _count(self, kind: str) -> None:
        self.outcome.hits[kind] += 1

    def _identical(self, one: Content, other: Content) -> None:
        assert_identical(one, other)
        self.outcome.compared_bytes += SIZE

    def _mark(self) -> int:
        return self.target.mark() if isinstance(self.target, Lossy) else 0

    def _may_differ(self, lost_at: int) -> set[int]:
        """The granules that may be sent again: what guests have written to since READY (after a
        power cut the regions); in the first copy, what had not been sent and flushed."""
        unit = REGION if self.plan.is_power_cut else GRANULE
        touched = _units([_round_out(*one, unit) for one in self.guest.touched])
        if self.cell.phase != "first copy":
            return touched
        return touched | (_units([(0, SIZE)]) - self._flushed(lost_at))

    def _flushed(self, lost_at: int) -> set[int]:
        """The least that must count as flushed: of what was sent before the last flush but one,
        since the last may not have been answered, all but what may have been in flight then. In
        write-blocking mode guests' flushes reach the target too, and count for nothing."""
        plan = self.plan
        if plan.is_power_cut or plan.is_write_blocking or not isinstance(self.target, Lossy):
            return set()
        requests = self.target.requests()[:lost_at]
        flushes = [index for index, (kind, _, _) in enumerate(requests) if kind == "flush"]
        sent = [one[1:] for one in requests[: flushes[-2]]] if len(flushes) > 1 else []
        in_flight = 0
        while sent and in_flight < IN_FLIGHT_BYTES:
            in_flight += sent.pop()[1]
        return _units(sent)

    def _check_sent(self, lost_at: int) -> None:
        """Since then the target was sent nothing but what may differ."""
        self.outcome.had_pivoted = self.is_pivoted
        units = self._may_differ(lost_at)
        if not self.is_pivoted:
            self.outcome.bound_bytes = len(units) * GRANULE
        if isinstance(self.target, Lossy):
            stray = _units(self.target.changed(lost_at)) - units
            assert not stray, f"sent again for no reason: granules {sorted(stray)}"

    def _check_again(self) -> None:
        again = self.outcome.again_bytes
        if again is not None:
            assert again <= self.outcome.bound_bytes, self.outcome

    # The end.

    def _finish(self) -> None:
        if self.is_pivoted:
            self._go_back()
        else:
            self._end_mirror()

    def _end_mirror(self) -> None:
        guest, qmp, is_complete = self.guest, self.qmp, self.plan.ending.endswith("complete")
        if self.cell.guest == "busy":
            guest.resume()
            guest.wait_for_requests(20)
            if not is_complete:
                guest.pause()
        qmp.execute(self.plan.ending, device="j")
        qmp.wait_completed()
        if self.cell.guest == "busy" and is_complete:
            guest.wait_for_requests(20)
            guest.pause()
        guest.settle()
        guest.take_for_flushed()
        self._identical(guest.content(), self.target.uri())
        if self.cell.guest == "idle" or not is_complete:
            self._identical(self.source.uri() if self.source else self.disk, self.target.uri())

    def _go_back(self) -> None:
        """From the target, which is the disk now, to where it came from."""
        guest, qmp = self.guest, self.qmp
        if self.cell.guest == "busy":
            guest.resume()
            guest.wait_for_requests(20)
        guest.pause()
        guest.settle()
        guest.take_for_flushed()
        home = self.source or self._start(QemuNbd(self.folder, self.disk))
        qmp.start_mirror(home.uri(), device="vda", job_id="back", granularity=GRANULE)
        qmp.wait_ready("back")
        qmp.execute("block-job-cancel", device="back")
        qmp.wait_completed("back")
        self._identical(guest.content(), self.target.uri())
        self._identical(self.target.uri(), home.uri())


def _round_out(offset: int, length: int, unit: int) -> Range:
    start = offset // unit * unit
    end = -(-(offset + length) // unit) * unit
    return start, min(end, SIZE) - start


def _units(ranges: list[Range]) -> set[int]:
    """Numbers of granules."""
    return {
        unit
        for offset, length in ranges
        for unit in range(offset // GRANULE, -(-(offset + length) // GRANULE))
    }
