"""A host of its own, booted with systemd: namespaces of this machine, over its files.

What the host changes of them is gone with the test's folder, or there after a reboot within the
test. The checkout is /opt/checkout in there, its virtual environment /opt/nbdmirror, and the
folder of the test /srv/test.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support.processes import ROOT, run
from support.waiting import wait_until

BOOT_S_MAX = 60.0
INIT = Path("/lib/systemd/systemd")
CGROUPS = Path("/sys/fs/cgroup")

BOOT = r"""
set -eu
cd "$1"; checkout=$2 environment=$3 is_v2=$4
mount --make-rprivate /
mkdir -p upper work root
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
: >>console
cd root
mkdir -p opt/checkout opt/nbdmirror srv/test
mount --bind "$checkout" opt/checkout
mount --bind "$environment" opt/nbdmirror
mount --bind .. srv/test
# Services of this machine stay out, and so do its file systems.
[ -e ../units ] || mkdir ../units
mount --bind ../units etc/systemd/system
: >etc/fstab
# Nothing is to be made for a first boot.
touch etc/.updated var/.updated
cat >usr/local/bin/nbdmirror <<'END'
#!/bin/sh
PYTHONPATH=/opt/checkout exec /opt/nbdmirror/bin/python -m nbdmirror "$@"
END
chmod 755 usr/local/bin/nbdmirror
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount -t tmpfs tmpfs sys/fs/cgroup
if [ "$is_v2" = 1 ]; then
    mount -t cgroup2 cgroup2 sys/fs/cgroup
else
    mkdir sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
fi
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do
    : >dev/$name
    mount --bind /dev/$name dev/$name
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
: >dev/console
mount --bind ../console dev/console
# Not chroot: who is in one may not have user namespaces of his own.
# By the C library: not every system's util-linux has a command for that.
/usr/bin/python3 -c 'import ctypes, sys; sys.exit(ctypes.CDLL(None).pivot_root(b".", b"mnt"))'
umount -l mnt
exec /usr/bin/env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system systemd.unit=multi-user.target
"""
"""Its arguments: the test's folder, the checkout, the virtual environment, and 1 where the machine
has the newer cgroups."""


def _has_v2(place: Path) -> bool:
    return (place / "cgroup.controllers").exists()


class Booted:
    """`start` boots it, `power_off` ends it in order, `cut_power` at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Newer systemds run with the newer cgroups alone; a machine may have them beside the older.
        places = [place for place in (CGROUPS, CGROUPS / "unified") if _has_v2(place)]
        self._is_v2 = bool(places)
        top = places[0] if places else CGROUPS / "systemd"
        self._group = top / f"nbdmirror-{os.getpid()}-{folder.name}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._group.mkdir()
        inside = f'echo $$ >{self._group}/cgroup.procs && exec unshare "$@"'
        start = ("sh", "-c", inside, "sh", "-pfmniuC", "--kill-child")
        places = (self.folder, ROOT, sys.prefix)
        self._process = subprocess.Popen(
            [*start, "bash", "-c", BOOT, "boot", *map(str, places), str(int(self._is_v2))],
            stdin=subprocess.DEVNULL,
        )
        wait_until(self._is_up, "the host is up", BOOT_S_MAX)

    def run(self, command: str, *, check: bool = True) -> str:
        """A shell's command in there; what it printed, errors as well."""
        found = run(*self._inside(), "sh", "-c", f"exec 2>&1; {command}", check=check)
        return found.stdout.strip()

    def path(self, there: str) -> Path:
        """From here, as for Unix sockets."""
        return Path(f"/proc/{self._init}/root{there}")

    def kill(self, there: int) -> None:
        """A process, by its number in there."""
        self.run(f"kill -KILL {there}")

    def power_off(self) -> None:
        assert self._process is not None
        self.run("systemctl poweroff")
        self._process.wait(BOOT_S_MAX)
        self._forget()

    def cut_power(self) -> None:
        if self._process is not None:
            with contextlib.suppress(AssertionError, ProcessLookupError):
                os.kill(self._init, signal.SIGKILL)
            self._process.kill()
            self._process.wait(BOOT_S_MAX)
            self._forget()

    @property
    def _init(self) -> int:
        assert self._process is not None
        number = self._process.pid
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
        assert children, "the host has ended"
        return int(children[0])

    def _inside(self) -> list[str]:
        return ["nsenter", "-t", str(self._init), "-m", "-p", "-n", "-i", "-u", "-r", "-w"]

    def _is_up(self) -> bool:
        assert self._process is not None
        console = self.folder / "console"
        assert self._process.poll() is None, console.read_text() if console.exists() else "no boot"
        with contextlib.suppress(AssertionError, OSError, subprocess.CalledProcessError):
            return self.run("systemctl is-system-running", check=False) in ("running", "degraded")
        return False

    def _forget(self) -> None:
        self._process = None
        groups = sorted((path for path in self._group.rglob("*") if path.is_dir()), reverse=True)
        for group in (*groups, self._group):
            wait_until(partial(_removed, group), f"{group} is empty")


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def booted(folder: Path) -> Iterator[Booted]:
    """For a fixture."""
    if os.geteuid() or not INIT.exists():
        pytest.skip("booting a host with systemd takes root, and systemd")
    host = Booted(folder)
    host.start()
    try:
        yield host
    finally:
        host.cut_power()
