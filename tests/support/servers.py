"""Servers of every kind, ours and others'.

They come unstarted: `with QemuNbd(folder, image) as target:`, or `start(QemuNbd(...))` with the
fixture. Each is ready when that returns, and its end is waited for.
"""

from __future__ import annotations

import sys
from pathlib import Path

from support.processes import ROOT, free_port, nbdmirror_environment, patched
from support.qmpclient import Qmp
from support.serverprocess import Server

PLUGIN = ROOT / "plugin" / "nbdmirror-plugin.py"


class Nbdmirror(Server):
    """The server under test, in the foreground. `bare`: nbdkit with the plugin, without the CLI.

    `disks` are paths, URIs, or NAME=... of those; `options` are the CLI's (or, if bare, plugin
    parameters); `nbdkit` are nbdkit's own options.
    """

    name = "nbdmirror"
    patches = ""
    """What its interpreter runs first: see `patched`."""
    layer = 1
    unwanted = r"Traceback|ERROR|CRITICAL|error:|[Ee]xception"

    def __init__(
        self,
        folder: Path,
        *disks: Path | str,
        bare: bool = False,
        tcp: bool = False,
        options: tuple[str, ...] = (),
        nbdkit: tuple[str, ...] = (),
    ) -> None:
        super().__init__(folder)
        self.disks = [str(disk) for disk in disks]
        self.bare = bare
        self.port = free_port() if tcp else 0
        self.options = options
        self.nbdkit = nbdkit
        self.qmp_path = folder / f"qmp{self.number}"
        self._qmp: Qmp | None = None

    def argv(self) -> list[str]:
        if self.bare:
            listen = ["-i", "127.0.0.1", "-p", str(self.port)] if self.port else ["-U", self.socket]
            disks = [f"file={disk}" for disk in self.disks]
            nbdkit = ["nbdkit", "-f", *map(str, listen), *self.nbdkit]
            return [*nbdkit, "python", str(PLUGIN), *disks, f"qmp={self.qmp_path}", *self.options]
        listen = ["--port", str(self.port)] if self.port else ["--socket", str(self.socket)]
        extra = ["--", *self.nbdkit] if self.nbdkit else []
        serve = [sys.executable, "-m", "nbdmirror", "serve", *self.disks, *map(str, listen)]
        return [*serve, "--qmp", str(self.qmp_path), *self.options, *extra]

    def environment(self) -> dict[str, str]:
        environment = nbdmirror_environment()
        return patched(environment, self.folder, self.patches) if self.patches else environment

    def uri(self, export: str = "") -> str:
        return f"nbd://127.0.0.1:{self.port}/{export}" if self.port else super().uri(export)

    def is_ready(self) -> bool:
        """nbdkit answers, and so does the control endpoint."""
        if not super().is_ready():
            return False
        with Qmp(self.qmp_path):
            return True

    @property
    def qmp(self) -> Qmp:
        """A client of its control socket, made when first asked for."""
        if self._qmp is None:
            self._qmp = Qmp(self.qmp_path)
        return self._qmp

    def stop(self) -> None:
        was_running = self.process is not None
        try:
            super().stop()
        finally:
            self._close_qmp()
        if was_running:
            assert not self.qmp_path.exists(), "the control socket was left behind"

    def kill(self) -> None:
        super().kill()
        self._close_qmp()

    def _close_qmp(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None


class QemuNbd(Server):
    """qemu-nbd of an image file."""

    name = "qemu-nbd"

    def __init__(
        self,
        folder: Path,
        image: Path | str,
        fmt: str = "raw",
        *,
        shared: int = 16,
        read_only: bool = False,
        export: str = "",
        options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(folder)
        self.image = Path(image)
        self.export = export
        self.options = [f"--shared={shared}", *(["--read-only"] if read_only else []), *options]
        self.fmt = fmt
        self.image_name = str(image)
        """An URI's has no path."""

    def argv(self) -> list[str]:
        fixed = ["--persistent", "--discard=unmap", f"--socket={self.socket}"]
        names = [f"--export-name={self.export}", f"--format={self.fmt}"]
        return ["qemu-nbd", *fixed, *names, *self.options, self.image_name]

    def uri(self, export: str | None = None) -> str:
        return super().uri(self.export if export is None else export)


class NbdkitTarget(Server):
    """nbdkit with a plugin and filters: NbdkitTarget(folder, "memory", "1M",
    filters=("delay",))."""

    name = "nbdkit"
    may_abort = True

    def __init__(
        self,
        folder: Path,
        plugin: str,
        *parameters: str,
        filters: tuple[str, ...] = (),
        options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(folder)
        self.plugin = plugin
        self.parameters = parameters
        self.options = [*(f"--filter={name}" for name in filters), *options]

    def argv(self) -> list[str]:
        return [
            "nbdkit", "-f", "-U", str(self.socket), *self.options, self.plugin, *self.parameters,
        ]  # fmt: skip


def strict_blocks(minimum: str, preferred: str, maximum: str) -> tuple[str, ...]:
    """Parameters of the filter blocksize-policy: requests outside of the limits are refused."""
    limits = {"minimum": minimum, "preferred": preferred, "maximum": maximum}
    words = (f"blocksize-{name}={limit}" for name, limit in limits.items())
    return ("blocksize-error-policy=error", *words)


class OnTcp(NbdkitTarget):
    """nbdkit with a file, listening on all IPv4 addresses of this host."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.port = free_port()
        super().__init__(folder, "file", str(image))
        self.image = image

    def argv(self) -> list[str]:
        return [*super().argv()[:2], "-i", "0.0.0.0", "-p", str(self.port), *super().argv()[4:]]

    def uri(self, export: str = "", host: str = "127.0.0.1") -> str:
        return f"nbd://{host}:{self.port}/{export}"


class QsdTarget(Server):
    """qemu-storage-daemon with one writable export."""

    name = "qsd"

    def __init__(self, folder: Path, image: Path, fmt: str = "raw") -> None:
        super().__init__(folder)
        self.image = image
        self.fmt = fmt
        self.image_name = str(image)
        """An URI's has no path."""

    def argv(self) -> list[str]:
        file = f"driver=file,node-name=file0,filename={self.image},discard=unmap"
        return [
            "qemu-storage-daemon",
            "--blockdev", file,
            "--blockdev", f"driver={self.fmt},node-name=disk,file=file0,discard=unmap",
            "--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=16",
            "--export", "type=nbd,id=export0,node-name=disk,name=disk,writable=on",
        ]  # fmt: skip

    def uri(self, export: str = "disk") -> str:
        return super().uri(export)
