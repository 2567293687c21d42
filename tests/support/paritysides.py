"""The two servers that hold a conversation (parity.py), qemu-storage-daemon and nbdmirror, each
with images, servers of targets, and faults of its own.

On both sides the disk is called `src` (a node of the daemon, a disk of nbdmirror) and exported
under that name; the targets are added over QMP as `tgt`.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nbd
from support.clients import connected
from support.images import MiB, make_empty, make_image, make_noise
from support.qmpclient import Qmp
from support.serverprocess import Server
from support.servers import Nbdmirror, QemuNbd

STEP_S_MAX = 20.0
"""For one step; the longest thing that a script waits for is a back-off of 5 s."""

Kind = Literal["qsd", "nbdmirror"]
KINDS: tuple[Kind, ...] = ("qsd", "nbdmirror")


@dataclass(frozen=True, slots=True)
class Setting:
    """The servers and images of each side.

    `source` and `target`: "plain" is a raw file, the target's behind qemu-nbd; "faulty" is a raw
    file behind a server whose faults are switched by the script.
    """

    size: int = MiB
    target_size: int | None = None
    source: Literal["plain", "faulty"] = "plain"
    target: Literal["plain", "faulty", "none"] = "plain"
    source_content: Literal["noise", "runs", "empty"] = "noise"
    target_content: Literal["noise", "empty"] = "noise"
    source_options: tuple[str, ...] = ()
    target_read_only: bool = False
    patches: str = ""
    """What the interpreter of nbdmirror's server runs first."""


FAULTY = '''
"""nbdkit's Python plugin script: a file, and faults, each a file DIR/read, DIR/write or DIR/flush
with an errno's name and how often (or for ever), or "hold" for no answer until that changes."""
import errno, os, time
import nbdkit
API_VERSION = 2
SETTINGS, LEFT = {}, {}
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def config(key, value): SETTINGS[key] = value
def open(readonly): return os.open(SETTINGS["file"], os.O_RDWR)
def close(h): os.close(h)
def get_size(h): return os.fstat(h).st_size
def can_write(h): return True
def can_flush(h): return True
def can_fua(h): return nbdkit.FUA_NATIVE
def can_multi_conn(h): return True
def pread(h, buf, offset, flags):
    fault("read"); data = os.pread(h, len(buf), offset); buf[:] = data
def pwrite(h, buf, offset, flags): fault("write"); os.pwrite(h, buf, offset)
def flush(h, flags): fault("flush")
def fault(operation):
    while True:
        try:
            with __builtins__.open(os.path.join(SETTINGS["faults"], operation)) as file:
                what, times, number = file.read().split()
        except FileNotFoundError:
            return
        if what == "hold":
            io.open(os.path.join(SETTINGS["faults"], operation + ".held"), "w").close()
            time.sleep(0.003)
            continue
        left = LEFT.setdefault(number, int(times) if times.isdigit() else -1)
        if left == 0:
            return
        LEFT[number] = left - 1
        nbdkit.set_error(getattr(errno, what))
        raise OSError(getattr(errno, what), "a fault")
'''
FAULTY = FAULTY.replace("__builtins__.open", "io.open").replace("import errno", "import io, errno")


class Faulty(Server):
    """nbdkit with the plugin above. Faults outlive the server: they are files."""

    name = "faulty"
    may_abort = True

    def __init__(self, folder: Path, image: Path) -> None:
        super().__init__(folder)
        self.image = image
        self.faults = folder / f"faults{self.number}"
        self.faults.mkdir()
        self._serial = 0

    def argv(self) -> list[str]:
        script = self.folder / "faulty.py"
        script.write_text(FAULTY)
        file = f"file={self.image}"
        return [
            # Threads for as many requests as buf-size allows, and a flush while those are held.
            "nbdkit", "-f", "-t", "100", "-U", str(self.socket), "python", str(script), file,
            f"faults={self.faults}",
        ]  # fmt: skip

    def set(self, operation: str, fault: str, times: int | None = None) -> None:
        self._serial += 1
        self.held(operation).unlink(missing_ok=True)
        new = self.faults / "new"
        new.write_text(f"{fault} {'ever' if times is None else times} {operation}{self._serial}")
        new.replace(self.faults / operation)

    def held(self, operation: str) -> Path:
        """Exists once such a request is held."""
        return self.faults / f"{operation}.held"

    def heal(self, operation: str) -> None:
        (self.faults / operation).unlink(missing_ok=True)


class StorageDaemon(Server):
    """qemu-storage-daemon with a monitor, and its node `src` exported."""

    name = "daemon"

    def __init__(self, folder: Path, source: str) -> None:
        """`source`: --blockdev's options beside the node's name."""
        super().__init__(folder)
        self.qmp_path = folder / f"monitor{self.number}"
        self.source = source

    def argv(self) -> list[str]:
        return [
            "qemu-storage-daemon",
            "--blockdev", f"node-name=src,{self.source}",
            "--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=16",
            "--export", "type=nbd,id=export0,node-name=src,name=src,writable=on",
            "--chardev", f"socket,id=monitor0,path={self.qmp_path},server=on,wait=off",
            "--monitor", "chardev=monitor0",
        ]  # fmt: skip

    def uri(self, export: str = "src") -> str:
        return super().uri(export)

    def is_ready(self) -> bool:
        return super().is_ready() and self.qmp_path.exists()

    def stop(self) -> None:
        """It may have been broken on purpose, and is not what is tested."""
        self.kill()


class Side:
    """One server with its images and targets, in a folder of its own, and what it said."""

    def __init__(self, kind: Kind, folder: Path, setting: Setting) -> None:
        self.kind = kind
        self.folder = folder
        self.setting = setting
        self.source_image = folder / "source.img"
        make = {"noise": make_noise, "runs": make_image}
        if setting.source_content == "empty":
            make_empty(self.source_image, setting.size)
        else:
            make[setting.source_content](self.source_image, setting.size, 1)
        self.stack = contextlib.ExitStack()
        self.faulty: dict[str, Faulty] = {}
        self.targets: dict[str, tuple[Server, Path]] = {}
        self.qmp: Qmp
        self.server: Nbdmirror | StorageDaemon
        self._guest: nbd.NBD | None = None

    def __enter__(self) -> Side:
        with contextlib.ExitStack() as stack:
            self._targets_stack = stack.enter_context(contextlib.ExitStack())
            if self.setting.target != "none":
                self._start_target(stack)
            self.server = self._server(stack)
            stack.enter_context(self.server)
            self.qmp = stack.enter_context(Qmp(self.server.qmp_path, timeout_s=STEP_S_MAX))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._guest = None
        self.stack.__exit__(*error)

    @property
    def uri(self) -> str:
        return self.server.uri("src")

    def target_socket(self, name: str = "tgt") -> str:
        return str(self.targets[name][0].socket)

    @property
    def guest(self) -> nbd.NBD:
        """One connection, from the first guest step to the end: also over a pivot."""
        if self._guest is None:
            self._guest = self.stack.enter_context(connected(self.uri))
        return self._guest

    def start_target(self, name: str, size: int, content: str = "noise") -> None:
        """One more, on qemu-nbd; it ends after the server."""
        image = self.folder / f"{name}.img"
        (make_noise if content == "noise" else make_empty)(image, size)
        server = self._targets_stack.enter_context(QemuNbd(self.folder, image))
        self.targets[name] = (server, image)

    def _start_target(self, stack: contextlib.ExitStack) -> None:
        setting = self.setting
        image = self.folder / "target.img"
        size = setting.size if setting.target_size is None else setting.target_size
        (make_noise if setting.target_content == "noise" else make_empty)(image, size)
        server: Server
        if setting.target == "faulty":
            server = self.faulty["target"] = Faulty(self.folder, image)
        else:
            server = QemuNbd(self.folder, image, read_only=setting.target_read_only)
        self.targets["tgt"] = (stack.enter_context(server), image)

    def _server(self, stack: contextlib.ExitStack) -> Nbdmirror | StorageDaemon:
        if self.setting.source == "faulty":
            server = Faulty(self.folder, self.source_image)
            self.faulty["source"] = stack.enter_context(server)
            qsd, disk = f"driver=nbd,server.type=unix,server.path={server.socket}", server.uri()
        else:
            qsd = f"driver=file,discard=unmap,filename={self.source_image}"
            disk = str(self.source_image)
        if self.kind == "qsd":
            return StorageDaemon(self.folder, qsd)
        options = self.setting.source_options
        mirror = Nbdmirror(self.folder, f"src={disk}", bare=True, options=options)
        mirror.patches = self.setting.patches
        mirror.allowed = [r"different sizes|has \d+ bytes"]
        return mirror


def is_root() -> bool:
    return os.geteuid() == 0
