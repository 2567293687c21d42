"""What there is in a round of trouble (rounds.py): a disk, its server with a state directory, a
target, a guest; how each is killed, and comes back.

A server that is told to kills itself before one of its steps in the state directory.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from faults.roundplan import SIZE, ZONES, Cell, Outcome, Plan
from faults.witness import Witness
from support.images import make_image, make_noise
from support.kept import Kept
from support.losing import SELDOM_FLUSHES, Lossy
from support.proxy import Proxy
from support.qmpclient import Qmp
from support.serverprocess import Server
from support.servers import QemuNbd

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

QUICK_FLUSHES = """
import nbdmirror.mirror.target_watch as watch
watch.FLUSH_S = watch.READY_FLUSH_S = 0.15
"""
NOT_OURS = r"is not the disk any more: since .* it is served from (\S+) \("


class Mirror(Kept):
    """With no bugs of ours in what it says; nbdkit and the log speak of guests and targets lost."""

    unwanted = r"Traceback|CRITICAL|AssertionError|error in the event loop"

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
class Scene:
    """What a round has to play with: the disk, its server, the target, the guest; and how they are
    killed and come back."""

    folder: Path
    cell: Cell
    seed: int
    patches: str = ""
    """Code for the server's interpreter: a mutant."""
    chosen: dict[str, Any] = field(default_factory=dict)
    """Of the plan, in place of what the seed says."""
    _started: list[Server] = field(default_factory=list)
    _memory: set[Path] = field(default_factory=set)

    def _choose(self) -> None:
        """What is done, by the seed."""
        noise = random.Random(f"{self.cell} {self.seed}")
        self.plan = replace(Plan.of(self.cell, noise), **self.chosen)
        self.noise = noise
        self.outcome = Outcome(self.cell, self.seed, self.plan)

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
        self.server.patches += QUICK_FLUSHES if plan.has_quick_flushes else SELDOM_FLUSHES
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

    @property
    def _target_may_be_disk(self) -> bool:
        return self.cell.phase in ("completing", "pivoted")

    def _mark(self) -> int:
        return self.target.mark() if isinstance(self.target, Lossy) else 0

    def _count(self, kind: str) -> None:
        self.outcome.hits[kind] += 1

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
