"""Servers that people mirror to, each with what docs/targets.md calls it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from support.images import MiB
from support.processes import free_port, has_ended, run
from support.serverprocess import Server
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd, QsdTarget, strict_blocks
from support.waiting import START_S_MAX, STOP_S_MAX, wait_until

SIZE = 8 * MiB


class NbdServer(Server):
    """nbd-server of a raw file, with options of its configuration. It knows no foreground."""

    name = "nbd-server"

    def __init__(self, folder: Path, image: Path, *options: str) -> None:
        super().__init__(folder)
        self.image = image
        self.pidfile = folder / f"nbd-server{self.number}.pid"
        self.configuration = folder / f"nbd-server{self.number}.conf"
        # It listens on TCP as well as on the socket, whatever it is told.
        listen = [f"unixsock = {self.socket}", "listenaddr = 127.0.0.1", f"port = {free_port()}"]
        export = ["[disk]", f"exportname = {image}", *(f"{option} = true" for option in options)]
        self.configuration.write_text("\n".join(["[generic]", *listen, *export, ""]))

    def argv(self) -> list[str]:
        return ["nbd-server", "-C", str(self.configuration), "-p", str(self.pidfile)]

    def uri(self, export: str = "disk") -> str:
        return super().uri(export)

    def start(self) -> Self:
        # Since 3.27 the daemon keeps the output that it was started with: a pipe would never end.
        with (self.folder / f"nbd-server{self.number}.log").open("w") as log:
            subprocess.run(self.argv(), check=True, stdout=log, stderr=log, timeout=START_S_MAX)
        wait_until(self.is_ready, "nbd-server is ready", START_S_MAX)
        return self

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            pid = int(self.pidfile.read_text())
            self.pidfile.unlink(missing_ok=True)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            wait_until(lambda: has_ended(pid), "nbd-server ends", STOP_S_MAX)


Make = Callable[[Path, Path], Server]


@dataclass(frozen=True)
class Target:
    """`make(folder, noise)`: the server, unstarted; what it serves held noise before, where it can
    hold anything (`noise` is a raw file that it may serve). `file`: what it keeps its data in, in
    the folder, for how much of that is allocated."""

    title: str
    make: Make
    file: str = "target.img"
    refusal: str = ""
    """A regular expression: it cannot be a target, and this is why."""

    def __str__(self) -> str:
        return self.title


def image(fmt: str, *options: str) -> Make:
    """qemu-nbd of an image in that format, full of noise."""
    return lambda folder, noise: QemuNbd(
        folder, converted(noise, folder / "image", fmt), fmt, options=options
    )


class KeepingQemuNbd(QemuNbd):
    """It ignores that ranges are discarded, as it does by default."""

    def argv(self) -> list[str]:
        return [word for word in super().argv() if word != "--discard=unmap"]


def converted(noise: Path, path: Path, fmt: str) -> Path:
    run("qemu-img", "convert", "-O", fmt, noise, path)
    return path


def qsd(fmt: str) -> Make:
    return lambda folder, noise: QsdTarget(folder, converted(noise, folder / "image", fmt), fmt)


def file_behind(*filters: str, **settings: str) -> Make:
    """nbdkit's file plugin behind filters."""
    parameters = [f"{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return lambda folder, noise: NbdkitTarget(
        folder, "file", str(noise), *parameters, filters=filters
    )


def in_blocks(*limits: str) -> Make:
    """nbdkit's file plugin with a minimum, a preferred and a maximum block size."""
    return lambda folder, noise: NbdkitTarget(
        folder, "file", str(noise), *strict_blocks(*limits), filters=("blocksize-policy",)
    )


def memory(folder: Path, noise: Path, *parameters: str) -> Server:
    return Filled(folder, "memory", str(SIZE), *parameters, noise=noise)


class Filled(NbdkitTarget):
    """A plugin that begins empty."""

    def __init__(
        self, folder: Path, *words: str, noise: Path, options: tuple[str, ...] = ()
    ) -> None:
        super().__init__(folder, *words, options=options)
        self.noise = noise

    def start(self) -> Self:
        super().start()
        run("nbdcopy", self.noise, self.uri())
        return self


def split(folder: Path, noise: Path) -> Server:
    """One disk in two files."""
    halves = [folder / "half0", folder / "half1"]
    with noise.open("rb") as file:
        for half in halves:
            half.write_bytes(file.read(SIZE // 2))
    return NbdkitTarget(folder, "split", *map(str, halves))


def luks(folder: Path, noise: Path) -> Server:
    secret = folder / "secret"
    secret.write_text("open sesame")
    encrypted = folder / "encrypted"
    key = ("--object", f"secret,id=key,file={secret}", "-o", "key-secret=key,iter-time=10")
    convert = ("qemu-img", "convert", "-O", "luks", *key, noise, encrypted)
    # QEMU times how long a key takes, and now and then finds its clock too coarse: "Unable to get
    # accurate CPU usage".
    wait_until(lambda: run(*convert, check=False).returncode == 0, "an encrypted image is made")
    parameters = (str(encrypted), f"passphrase=+{secret}")
    return NbdkitTarget(folder, "file", *parameters, filters=("luks",))


SHELL = """#!/bin/sh
case $1 in
    get_size) stat -L -c %s "$tmp_image" ;;
    pread) dd if="$tmp_image" iflag=skip_bytes,count_bytes skip="$4" count="$3" status=none ;;
    pwrite) dd of="$tmp_image" oflag=seek_bytes seek="$4" conv=notrunc status=none ;;
    can_write|can_flush) exit 0 ;;
    flush) sync "$tmp_image" ;;
    *) exit 2 ;;
esac
"""


def shell(folder: Path, noise: Path) -> Server:
    script = folder / "plugin.sh"
    script.write_text(SHELL.replace("$tmp_image", str(noise)))
    script.chmod(0o755)
    return NbdkitTarget(folder, "sh", str(script))


def relayed(folder: Path, noise: Path) -> Server:
    """nbdkit's nbd plugin: a server behind a server."""

    class Relay(NbdkitTarget):
        behind = QemuNbd(folder, noise)

        def start(self) -> Self:
            self.behind.start()
            return super().start()

        def stop(self) -> None:
            super().stop()
            self.behind.stop()

        def kill(self) -> None:
            super().kill()
            self.behind.kill()

    # nbdkit connects with each of its clients.
    return Relay(folder, "nbd", f"uri={Relay.behind.uri()}")


def server(*options: str) -> Make:
    return lambda folder, noise: NbdServer(folder, noise, *options)


TARGETS = (
    Target("qemu-nbd, raw", QemuNbd),
    Target(
        "qemu-nbd, raw, one client (no `--shared`)",
        lambda folder, noise: QemuNbd(folder, noise, shared=1),
    ),
    Target(
        "qemu-nbd, raw, no `--discard=unmap`",
        KeepingQemuNbd,
    ),
    Target("qemu-nbd, qcow2", image("qcow2"), "image"),
    Target("qemu-nbd, qed", image("qed"), "image"),
    Target("qemu-nbd, vdi", image("vdi"), "image"),
    Target("qemu-nbd, vmdk", image("vmdk"), "image"),
    Target("qemu-nbd, vhdx", image("vhdx"), "image"),
    Target("qemu-storage-daemon, raw", qsd("raw"), "image"),
    Target("qemu-storage-daemon, qcow2", qsd("qcow2"), "image"),
    Target("another nbdmirror, raw", Nbdmirror),
    Target("nbdkit file", file_behind()),
    Target("nbdkit memory", memory, ""),
    Target(
        "nbdkit memory, `allocator=zstd`",
        lambda folder, noise: memory(folder, noise, "allocator=zstd"),
        "",
    ),
    Target("nbdkit split, two files", split, "half1", refusal="does not support flush"),
    Target("nbdkit sh, a script", shell),
    Target("nbdkit nbd, before qemu-nbd", relayed),
    Target("nbdkit file, luks filter", luks, "encrypted"),
    Target(
        "nbdkit file, blocks of 512 to 64K",
        in_blocks("512", "4K", "64K"),
    ),
    Target(
        "nbdkit file, blocks of 4K to 4K",
        in_blocks("4K", "4K", "4K"),
    ),
    Target(
        "nbdkit file, blocks of 64K to 32M",
        in_blocks("64K", "1M", "32M"),
    ),
    Target("nbdkit file, nozero filter", file_behind("nozero")),
    Target("nbdkit file, nozero filter, notrim", file_behind("nozero", zeromode="notrim")),
    Target("nbdkit file, fua filter, emulated", file_behind("fua", fuamode="emulate")),
    Target("nbdkit file, fua filter, forced", file_behind("fua", fuamode="force")),
    Target(
        "nbdkit file, one connection (multi-conn filter)",
        file_behind("multi-conn", multi_conn_mode="disable"),
    ),
    Target("nbdkit file, noextents filter", file_behind("noextents")),
    Target("nbdkit file, noparallel filter", file_behind("noparallel", serialize="requests")),
    Target("nbdkit file, readahead filter", file_behind("readahead")),
    Target("nbdkit file, cache filter", file_behind("cache", cache="writeback")),
    Target("nbdkit file, exportname filter", file_behind("exportname", exportname="disk")),
    Target("nbd-server", server(), refusal="does not support flush"),
    Target("nbd-server, flush", server("flush")),
    Target("nbd-server, flush, fua", server("flush", "fua")),
    Target("nbd-server, flush, fua, trim", server("flush", "fua", "trim")),
)

RBD = "qemu-nbd, a Ceph RBD image"
"""A row like these, but its server needs a Ceph: `tests/integration/ceph/test_ceph.py` has that."""
