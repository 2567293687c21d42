"""Tools that run to their end, the command line among them, and what our processes are told of the
checkout."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbd
from support.waiting import WAIT_S_MAX, wait_until

ROOT = Path(__file__).resolve().parents[2]


Finished = subprocess.CompletedProcess[str]


def nbdmirror_environment() -> dict[str, str]:
    """For the CLI, and for nbdkit's interpreter, which knows no virtual environment."""
    environ = {k: v for k, v in os.environ.items() if k != "NBDMIRROR_QMP"}
    places = [str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return {**environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(places))}


PREAMBLE = """
import time

def wait_while(is_so):
    # In place of a storage that is slow: nobody here could tell that it goes on.
    while is_so():
        time.sleep(0.01)
"""


def patched(environment: dict[str, str], folder: Path, code: str) -> dict[str, str]:
    """`environment` for a server whose interpreter runs `code` first: it finds a sitecustomize of
    ours. `code` may call `wait_while`."""
    place = folder / "patched"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(PREAMBLE + code)
    return environment | {"PYTHONPATH": f"{place}{os.pathsep}{environment['PYTHONPATH']}"}


def nbdmirror(*arguments: str | Path, timeout_s: float = WAIT_S_MAX) -> Finished:
    """Run a command of the CLI to its end."""
    return run(sys.executable, "-m", "nbdmirror", *arguments, timeout_s=timeout_s, check=False)


def run(*command: str | Path, timeout_s: float = WAIT_S_MAX, check: bool = True) -> Finished:
    """Run a tool to its end; if `check`, it must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        env=nbdmirror_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"{' '.join(done.args)}: {done.stdout}{done.stderr}"
    return done


def nbdkit_version() -> tuple[int, ...]:
    """Major and minor: nbdkit 1.32.5 is (1, 32)."""
    said = run("nbdkit", "--version").stdout.split()[1]
    return tuple(int(number) for number in said.split(".")[:2])


def freeze(pid: int) -> None:
    """SIGSTOP, and wait until each thread has stopped: until then it may answer a request yet."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")

    def is_stopped(status: Path) -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            return status.read_text().rpartition(")")[2].split()[0] in "Tt"
        return True

    wait_until(lambda: all(map(is_stopped, tasks.glob("*/stat"))), f"process {pid} has stopped")


def resources(pid: int) -> tuple[int, int, int]:
    """Resident bytes, threads, descriptors."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"]), descriptors


def settled(pid: int, threads: int, descriptors: int) -> int:
    """Resident bytes once the threads and descriptors of the last connections have gone."""

    def is_flat() -> bool:
        _, now_threads, now_descriptors = resources(pid)
        return now_threads <= threads and now_descriptors <= descriptors

    wait_until(is_flat, f"{threads} threads and {descriptors} descriptors again")
    return resources(pid)[0]


def libnbd_version() -> tuple[int, ...]:
    return tuple(int(number) for number in nbd.NBD().get_version().split(".")[:3])


_PORTS = range(10_000, 32_000)
"""Below those that the kernel gives to clients, of which one could have a server's meanwhile."""
_ports = itertools.cycle(random.SystemRandom().sample(_PORTS, len(_PORTS)))


def free_port() -> int:
    """Nobody listens there. Each call gives another one, in an order of this process's own."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


def has_ended(pid: int) -> bool:
    """Also if nobody has reaped it: that is the affair of process 1."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
