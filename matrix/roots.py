"""Roots: whole systems in a folder each, made by debootstrap and kept, with a clone of the checkout
in them."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from matrix import inside, machine

CHECKOUT = Path(__file__).resolve().parent.parent
PLACE = CHECKOUT / ".cache" / "matrix"
CLONE = "/srv/nbdmirror"
"""Where other users can read it, as some tests need."""

SYSTEMS = {"bookworm": "Debian 12", "trixie": "Debian 13", "sid": "Debian unstable"}
"""debootstrap's names, and ours."""

ROOM_BYTES = 4 << 30
"""What one system takes up with all that the tests need, and what they write."""


class MatrixError(Exception):
    """It cannot be done here; the text says why, and what is needed."""


def say(text: str) -> None:
    sys.stderr.write(f"matrix: {text}\n")


def check_machine() -> None:
    """Raise MatrixError where no root could be made or entered."""
    if os.geteuid() != 0:
        raise MatrixError("needs root, for debootstrap and namespaces: sudo ./run matrix")
    for tool in ("debootstrap", "git", "unshare", "setpriv", "chroot"):
        if not shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{inside.PATH}"):
            raise MatrixError(f"needs {tool}, which is not installed")
    trial = [*inside.NAMESPACES, "--mount-proc", "true"]
    done = subprocess.run(trial, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MatrixError(
            f"needs namespaces for mounts and processes, which this machine does not allow (a "
            f"container has to be privileged): {done.stderr.strip()}"
        )
    if subprocess.run(_git("rev-parse", "HEAD"), capture_output=True, check=False).returncode:
        raise MatrixError(f"needs a git checkout, and {CHECKOUT} is none")


def check_room() -> None:
    """Raise MatrixError unless one more system has room."""
    PLACE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(PLACE).free
    if free < ROOM_BYTES:
        raise MatrixError(
            f"needs {ROOM_BYTES >> 30} GiB for a system, and {PLACE} has {free / (1 << 30):.1f} GiB"
        )


FINISH = (
    ("dpkg", "--configure", "-a"),
    ("apt-get", "install", "--fix-broken", "--yes", "--quiet", "--no-install-recommends"),
)
"""An earlier run may have been interrupted while packages were installed."""


class Root:
    """One system. Its files are only used by one process at a time, see `locked`."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.title = SYSTEMS[suite]
        self.path = PLACE / suite
        self.log_path = PLACE / f"{suite}.log"
        self.results_path = self.path / CLONE[1:] / ".cache" / "matrix.xml"
        """pytest's, in JUnit's format."""

    @contextmanager
    def locked(self) -> Iterator[BinaryIO]:
        """For the time of a run. Yields the log, which is begun anew. Raises MatrixError if
        somebody else works there."""
        PLACE.mkdir(parents=True, exist_ok=True)
        with open(PLACE / f"{self.suite}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MatrixError(f"another run uses {self.path}") from None
            with open(self.log_path, "wb") as log:
                yield log

    def make(self, log: BinaryIO, *, is_fresh: bool) -> None:
        """The system, unless it is there already; then what comes from the machine."""
        if is_fresh and self.path.exists():
            remove(self.path)
        if not self.path.exists():
            check_room()
            self._bootstrap(log)
        machine.prepare(self.path)
        for command in (*FINISH, ("update-ca-certificates",)):
            if self.command(log, *command):
                text = f"'{' '.join(command)}' failed, see {self.log_path}"
                raise MatrixError(f"{self.title}: {text}, or try --fresh")

    def _bootstrap(self, log: BinaryIO) -> None:
        """It is there whole, or not at all."""
        unfinished = self.path.with_suffix(".unfinished")
        if unfinished.exists():
            remove(unfinished)
        mirror = machine.mirror()
        say(f"{self.title}: making a root from {mirror}, which takes some minutes")
        words = ["--variant=minbase", "--include=ca-certificates", self.suite, str(unfinished)]
        argv = [*inside.NAMESPACES, "--mount-proc", "debootstrap", *words, mirror]
        path = f"{os.environ.get('PATH', os.defpath)}:{inside.PATH}"
        if inside.run(argv, {**os.environ, "PATH": path}, log):
            raise MatrixError(f"{self.title}: debootstrap failed, see {self.log_path}")
        # As in containers: a package that is installed starts nothing.
        policy = unfinished / "usr/sbin/policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        unfinished.rename(self.path)

    def clone(self) -> None:
        """The checkout's last commit. What an earlier run made in the clone (its .venv, its .cache)
        is kept, as a user would keep it."""
        target = self.path / CLONE[1:]
        if not (target / ".git").exists():
            _check(["git", "clone", "--quiet", "--no-hardlinks", str(CHECKOUT), str(target)])
        head = _check(_git("rev-parse", "HEAD")).strip()
        within = ["git", "-C", str(target)]
        _check([*within, "fetch", "--quiet", str(CHECKOUT), "HEAD"])
        _check([*within, "checkout", "--quiet", "--force", "--detach", head])
        _check([*within, "clean", "-ffdq"])

    def command(self, log: BinaryIO, *command: str, folder: str = "/", **variables: str) -> int:
        """Run it inside. Returns its exit status."""
        shared = machine.shared(self.path)
        argv = inside.entering(self.path, *command, folder=folder, shared=shared)
        return inside.run(argv, {**machine.environment(), **variables}, log)


def remove(root: Path) -> None:
    """A root. Nothing of it is mounted: mounts are in other namespaces, and gone with them."""
    subprocess.run(["rm", "-rf", "--one-file-system", str(root)], check=True)


def is_changed() -> bool:
    """The checkout has changes that a clone has not."""
    return bool(_check(_git("status", "--porcelain", "--untracked-files=no")))


def _git(*words: str) -> list[str]:
    return ["git", "-C", str(CHECKOUT), *words]


def _check(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MatrixError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
