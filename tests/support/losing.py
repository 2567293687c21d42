"""What the tests of lost targets share: the forgetful target, what it was asked for, a mirror."""

from __future__ import annotations

import signal
from pathlib import Path

from support.clients import connections
from support.images import KiB, MiB
from support.processes import freeze
from support.qmpclient import Qmp
from support.seeds import print_seed
from support.servers import NbdkitTarget, Nbdmirror
from support.waiting import wait_until

PLUGIN = Path(__file__).with_name("lossy.py")

SIZE = 8 * MiB
GRANULE = 64 * KiB
RECONNECT_S = 20
CHANGES = ("write", "zero", "trim")

SELDOM_FLUSHES = """
import nbdmirror.mirror.target_watch
nbdmirror.mirror.target_watch.READY_FLUSH_S = 3600.0
"""

Range = tuple[int, int]


class SeldomFlushing(Nbdmirror):
    """After READY it flushes each FLUSH_S, whatever the lag: so there is something to lose."""

    patches = SELDOM_FLUSHES


class Lossy(NbdkitTarget):
    """lossy.py of `image`. It is killed, and started again on the same socket."""

    name = "lossy"

    def __init__(
        self, folder: Path, image: Path, *, multi_conn: bool = True, extents: bool = True
    ) -> None:
        super().__init__(folder, "python", str(PLUGIN))
        print_seed()
        self.image = image
        self.log_path = folder / f"lossy{self.number}.log"
        self.order_path = folder / f"lossy{self.number}.order"
        self.settings = {"multi-conn": int(multi_conn), "extents": int(extents)}

    def argv(self) -> list[str]:
        files = {"image": self.image, "log": self.log_path, "order": self.order_path}
        return [*super().argv(), *(f"{k}={v}" for k, v in (files | self.settings).items())]

    def order(self, text: str) -> None:
        """As lossy.py's `_obey` has it."""
        new = self.order_path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.order_path)

    def come_back(self, **settings: int) -> None:
        """After a kill; with `settings`, as `read_only=1`, changed."""
        self.settings |= {name.replace("_", "-"): value for name, value in settings.items()}
        super().come_back()

    def wait_killed(self) -> None:
        """Until it has done as ordered."""
        process = self.process
        assert process is not None
        wait_until(lambda: process.poll() is not None, "the target is killed as ordered")
        assert process.returncode == -signal.SIGKILL, self.stderr
        self.process = None

    def connections(self) -> int:
        """Clients that are connected now."""
        return connections(self.socket)

    def stall(self) -> None:
        freeze(self.pid)

    # The log.

    def requests(self, start: int = 0) -> list[tuple[str, int, int]]:
        """(kind, offset, length), without the first `start`."""
        lines = self.log_path.read_text().splitlines() if self.log_path.exists() else []
        words = [line.split() for line in lines[start:]]
        return [(kind, int(offset), int(length)) for kind, offset, length in words]

    def mark(self) -> int:
        """For `requests`: what comes from now on."""
        return len(self.requests())

    def changed(self, start: int = 0) -> list[Range]:
        """(offset, length) of writes, zeroes and trims."""
        requests = self.requests(start)
        return [(offset, length) for kind, offset, length in requests if kind in CHANGES]

    def changed_bytes(self, start: int = 0) -> int:
        return sum(length for _, length in self.changed(start))


def start_mirror(
    server: Nbdmirror, uri: str, *, reconnect_delay_s: int = RECONNECT_S, **options: object
) -> Qmp:
    """A mirror of "src" to the target at `uri`, a node "tgt"."""
    qmp = server.qmp
    add_target(qmp, uri, reconnect_delay_s)
    options = {"granularity": GRANULE, "on_target_error": "report"} | options
    qmp.start_mirror("tgt", device="src", **options)
    return qmp


def ready(server: Nbdmirror, uri: str, *, reconnect_delay_s: int = 20, policy: str = "stop") -> Qmp:
    """A mirror that is READY."""
    qmp = start_mirror(
        server, uri, reconnect_delay_s=reconnect_delay_s, on_target_error=policy, auto_dismiss=False
    )
    qmp.wait_ready()
    return qmp


def add_target(qmp: Qmp, uri: str, reconnect_delay_s: int) -> None:
    if uri.startswith("nbd+unix"):
        address = {"type": "unix", "path": uri.split("socket=", 1)[1]}
    else:
        host, port = uri.removeprefix("nbd://").split(":")
        address = {"type": "inet", "host": host, "port": port}
    qmp.execute(
        "blockdev-add", driver="nbd", node_name="tgt", server=address,
        reconnect_delay=reconnect_delay_s,
    )  # fmt: skip


def wait_caught_up(qmp: Qmp) -> None:
    """Until nothing is left to copy, with no guest that writes."""

    def is_level() -> bool:
        job = qmp.job()
        return bool(job["ready"] and job["offset"] == job["len"])

    wait_until(is_level, "the mirror has caught up")


def end(qmp: Qmp, verb: str) -> None:
    """Complete or soft cancel; both end with COMPLETED, without an error."""
    qmp.execute(verb, device="j")
    qmp.wait_completed()
