"""A Ceph of one node: a monitor and an OSD on the loopback interface, for RBD images behind
qemu-nbd. It needs no privileges, and everything of it is in one folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from support.mounts import ON_DISK
from support.processes import free_port, run
from support.servers import QemuNbd
from support.waiting import STOP_S_MAX, wait_until

POOL = "rbd"
CLIENT = "nbdmirror"
"""A user of the pool, with the rights that docs/ceph.md gives it, and no more."""
STORE_BYTES = 1 << 30
"""Of the OSD's store: a sparse file."""
FULL, ROOMY = "0.001", "0.95"
"""The part of the store that may be used. An OSD whose store is empty uses more than the first."""
USABLE_S_MAX = 60.0
"""An OSD that was killed checks its store when it starts, and its clients look for it every few
seconds."""

CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{port}]
ms bind msgr1 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {folder}/ceph.$name.keyring
log file = {folder}/$name.log
run dir = {folder}
admin socket =
# One copy of each object, since there is one OSD to keep it.
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
[mon]
mon data = {folder}/mon
public addrv = [v2:127.0.0.1:{port}]
paxos propose interval = 0.1
# It ends on a file system that is nearly full, though what it writes here is little.
mon data avail crit = 0
# Below these two a store is never full, whatever the third says.
mon osd nearfull ratio = {full}
mon osd backfillfull ratio = {full}
[osd]
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = {store_bytes}
# How soon a full store is told, and that there is room again.
osd heartbeat interval = 1
osd mon report interval = 1
"""


def missing() -> str:
    """What is not installed of what a `Ceph` and its images need; empty if all is there."""
    tools = [tool for tool in ("ceph-mon", "ceph-osd", "ceph", "rbd") if not shutil.which(tool)]
    # QEMU lists the driver in any case, and loads it when an image is opened.
    if "Pool name is required" not in run("qemu-img", "info", "rbd:", check=False).stderr:
        tools.append("QEMU's driver for RBD")
    return ", ".join(tools)


class Ceph:
    """Unstarted until `start`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nbdmirror-ceph-", dir=ON_DISK))
        self.configuration = self.folder / "ceph.conf"
        self._monitor: subprocess.Popen[bytes] | None = None
        self._osd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        try:
            self._start()
        except BaseException:
            for log in sorted(self.folder.glob("*.log")):
                sys.stderr.write(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
            self.stop()
            raise

    def _start(self) -> None:
        self._configure()
        self._monitor = self._spawn("ceph-mon", "-i", "a")
        self._make_osd()
        self.start_osd()
        self.admin("ceph", "osd", "pool", "create", POOL, "8")
        self.admin("rbd", "pool", "init", POOL)
        grants = ("mon", "profile rbd", "osd", f"profile rbd pool={POOL}")
        key = self.admin("ceph", "auth", "get-or-create", f"client.{CLIENT}", *grants)
        self._keyring(f"client.{CLIENT}").write_text(key)

    def stop(self) -> None:
        """End both, whatever state they are in, and remove all that they wrote."""
        for process in (self._osd, self._monitor):
            if process is not None:
                process.kill()
                process.wait(STOP_S_MAX)
        shutil.rmtree(self.folder)

    def admin(self, *command: str) -> str:
        """Output of a command of Ceph's, run as the administrator."""
        tool, *words = command
        return run(tool, "--conf", str(self.configuration), *words).stdout

    def add_image(self, name: str, content: Path, *options: str) -> None:
        """A new image that holds what is in a file; `options` are those of `rbd create`."""
        self.admin("rbd", "import", "--no-progress", *options, str(content), f"{POOL}/{name}")

    def location(self, image: str, **settings: str) -> str:
        """QEMU's name of an image, with settings of Ceph's client as `rados_osd_op_timeout="2"`."""
        options = {"conf": str(self.configuration), "id": CLIENT} | settings
        words = [f"{name}={value}" for name, value in options.items()]
        return ":".join([f"rbd:{POOL}/{image}", *words])

    # Faults

    def kill_osd(self) -> None:
        assert self._osd is not None
        self._osd.kill()
        self._osd.wait(STOP_S_MAX)

    def start_osd(self) -> None:
        """It is up when this returns."""
        before = self._up_from()
        self._osd = self._spawn("ceph-osd", "-i", "0")
        wait_until(lambda: self._up_from() > before, "the OSD is up", USABLE_S_MAX)

    def fill(self) -> None:
        """No room for another write; clients know when this returns, or with their next request."""
        self._set_full_ratio(FULL)
        wait_until(self.is_full, "the pool is full", USABLE_S_MAX)

    def make_room(self) -> None:
        self._set_full_ratio(ROOMY)
        wait_until(lambda: not self.is_full(), "the pool has room", USABLE_S_MAX)

    def heal(self) -> None:
        """After any of these faults."""
        assert self._osd is not None
        if self._osd.poll() is not None:
            self.start_osd()
        if self.is_full():
            self.make_room()

    def is_full(self) -> bool:
        pools = self._map()["pools"]
        return any("full" in pool["flags_names"].split(",") for pool in pools)

    def _set_full_ratio(self, ratio: str) -> None:
        self.admin("ceph", "osd", "set-full-ratio", ratio)

    def _up_from(self) -> int:
        """The number of the map in which the OSD last came up; 0: it never did, or is down."""
        osds = self._map()["osds"]
        return int(osds[0]["up_from"]) if osds and osds[0]["up"] else 0

    def _map(self) -> dict[str, list[dict[str, str]]]:
        found: dict[str, list[dict[str, str]]] = json.loads(
            self.admin("ceph", "osd", "dump", "--format=json")
        )
        return found

    # Making it

    def _configure(self) -> None:
        fsid = str(uuid.uuid4())
        self.configuration.write_text(
            CONFIGURATION.format(
                fsid=fsid,
                port=free_port(),
                folder=self.folder,
                store_bytes=STORE_BYTES,
                full=FULL,
            )
        )
        (self.folder / "mon").mkdir()
        (self.folder / "osd").mkdir()
        keys = self.folder / "first.keyring"
        self._make_key(keys, "mon.", "--cap", "mon", "allow *")
        self._make_key(
            self._keyring("client.admin"), "client.admin",
            "--cap", "mon", "allow *", "--cap", "osd", "allow *",
        )  # fmt: skip
        run("ceph-authtool", keys, "--import-keyring", self._keyring("client.admin"))
        self.admin("ceph-mon", "--mkfs", "-i", "a", "--fsid", fsid, "--mon-initial-members", "a",
                   "--keyring", str(keys))  # fmt: skip

    def _make_osd(self) -> None:
        key = run("ceph-authtool", "--gen-print-key").stdout.strip()
        secrets = self.folder / "secrets.json"
        secrets.write_text(json.dumps({"cephx_secret": key}))
        name = str(uuid.uuid4())
        self.admin("ceph", "osd", "new", name, "-i", str(secrets))
        self._keyring("osd.0").write_text(f"[osd.0]\nkey = {key}\n")
        self.admin("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", name)

    def _make_key(self, keyring: Path, name: str, *words: str) -> None:
        run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", name, *words)

    def _keyring(self, name: str) -> Path:
        return self.folder / f"ceph.{name}.keyring"

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        """A daemon in the foreground, so that it is ours to end. It works at the root, as it would
        in the background: Debian 13's finds its RBD code from there."""
        with (self.folder / f"{command[0]}.output").open("ab") as output:
            return subprocess.Popen(
                [*command, "-f", "--conf", str(self.configuration)],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )


class RbdNbd(QemuNbd):
    """qemu-nbd of an RBD image."""

    def __init__(self, folder: Path, ceph: Ceph, image: str, **settings: str) -> None:
        super().__init__(folder, Path(ceph.location(image, **settings)))
