"""A virtual machine with Linux in it, whose only disk is the one under test.

What runs in it is guest_init.sh: it writes files, and says on its console which file is on the disk
with which checksum. The transcript of the console is what images are compared with at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.guestparts import NoGuestHere, guest_parts, machine_options
from support.images import MiB
from support.processes import run
from support.qmpclient import Qmp
from support.serverprocess import Server
from support.waiting import START_S_MAX, WAIT_S_MAX, wait_until

DISK_BYTES = 64 * MiB
WRITERS = 2
"""As in guest_init.sh: that many files may be half written at any moment."""
ALL_FILES = 40
"""So many are written: each file once, at least."""
BOOT_S_MAX = 90.0
KERNEL_WORDS = "console=ttyS0 quiet loglevel=5 panic=-1 no_timer_check"
"""The last, since on a busy host Linux finds that emulated timers come too late to be there."""
FAULT = re.compile(r"guest: FAILED.*|I/O error.*|EXT4-fs (?:error|warning).*|.*panic - .*")
WROTE = re.compile(r"guest: wrote (\w+ (\d{6}) [0-9a-f]{32})\n")
"""The first line of a file, and its number: a file of a higher one is a later one."""


def nbd_drive(server: str, *, export: str = "", reconnect_delay: int = 0) -> str:
    """A -blockdev for a disk at `server`: a Unix socket's path, or HOST:PORT."""
    if server.startswith("/"):
        address = f"server.type=unix,server.path={server}"
    else:
        host, port = server.rsplit(":", 1)
        address = f"server.type=inet,server.host={host},server.port={port}"
    options = f"export={export},reconnect-delay={reconnect_delay},discard=unmap"
    return f"driver=nbd,node-name=disk,{address},{options}"


class Console:
    """A conversation with the guest. QEMU is the one that connects, so nothing said is lost."""

    def __init__(self, path: Path) -> None:
        self.transcript = ""
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._console: socket.socket | None = None
        self._heard = 0

    def listen(self) -> None:
        self._listener.bind(str(self._path))
        self._path.chmod(0o777)
        self._listener.listen()
        self._listener.settimeout(START_S_MAX)

    def accept(self) -> None:
        self._console, _ = self._listener.accept()
        self._console.setblocking(False)

    def hang_up(self) -> None:
        self._listener.close()
        if self._console is not None:
            self._console.close()

    def say(self, word: str) -> None:
        assert self._console is not None
        self._console.sendall(f"{word}\n".encode())

    def wait_for(self, pattern: str, timeout_s: float = WAIT_S_MAX) -> re.Match[str]:
        """The first match in what the guest says from now on, or has said since the last one."""

        def look() -> re.Match[str] | None:
            self.check()
            return re.compile(pattern).search(self.transcript, self._heard)

        try:
            found: re.Match[str] = wait_until(look, f"{pattern!r} on the console", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; heard: {self.transcript[-800:]}") from None
        self._heard = found.end()
        return found

    def check(self) -> None:
        """Listen; fail if the guest has had an error."""
        self._listen()
        fault = FAULT.search(self.transcript)
        assert not fault, f"the guest says: {fault[0]}"

    def do(self, word: str, answer: str) -> None:
        """Say it, and wait for the answer."""
        self.check()
        self._heard = len(self.transcript)
        self.say(word)
        self.wait_for(f"guest: {answer}")

    def wait_for_files(self, number: int, timeout_s: float = WAIT_S_MAX) -> None:
        """Until so many more were written: the guest lives."""
        self.check()
        self._heard = len(self.transcript)
        for _ in range(number):
            self.wait_for(WROTE.pattern, timeout_s)

    def verify(self) -> None:
        """The guest reads all that it has written from the disk; then it goes on writing."""
        self.do("pause", "paused")
        self.do("verify", r"verified [1-9]\d* files")
        self.say("write")

    def shut_down(self) -> str:
        """Verify, unmount and power off; returns the transcript."""
        self.do("pause", "paused")
        self.do("verify", r"verified [1-9]\d* files")
        self.do("unmount", "unmounted")
        self.say("halt")
        self.wait_off()
        self.check()
        return self.transcript

    def wait_off(self) -> None:
        """Until whatever runs the guest has seen it power off."""
        raise NotImplementedError

    def _listen(self) -> None:
        assert self._console is not None
        with contextlib.suppress(BlockingIOError):
            while received := self._console.recv(1 << 16):
                self.transcript += received.decode(errors="replace").replace("\r", "")


class Machine(Console, Server):
    """QEMU, booted when `start` returns: the disk is mounted and the guest waits for commands.

    `drive` is a -blockdev of a node named "disk", or empty: then `words` tell the guest how to get
    at one. `incoming` is where a machine that is to be moved here will come from: then nothing
    boots.
    """

    name = "guest"
    layer = 2

    def __init__(
        self,
        folder: Path,
        drive: str = "",
        *,
        words: str = "disk=vda",
        incoming: str = "",
        options: tuple[str, ...] = (),
    ) -> None:
        Server.__init__(self, folder)
        Console.__init__(self, self.socket)
        try:
            self.parts = guest_parts()
        except NoGuestHere as error:
            pytest.skip(str(error))
        self.drive = drive
        self.words = words
        self.incoming = incoming
        self.options = options
        self.qmp_path = folder / f"guest{self.number}.qmp"
        self.monitor_path = folder / f"guest{self.number}.monitor"
        """A second QMP socket, for the program under test: each takes one client at a time."""
        self._qmp: Qmp | None = None

    # As a server

    def argv(self) -> list[str]:
        parts = self.parts
        words = f"{KERNEL_WORDS} {self.words}"
        drive = ["-blockdev", self.drive, "-device", "virtio-blk-pci,drive=disk"]
        return [
            *machine_options(parts.kernel, parts.initramfs, parts.accelerator),
            "-append", words, *(drive if self.drive else []),
            *(["-incoming", self.incoming] if self.incoming else []), *self.options,
            "-qmp", f"unix:{self.monitor_path},server=on,wait=off",
            "-qmp", f"unix:{self.qmp_path},server=on,wait=off",
            "-chardev", f"socket,id=console,path={self.socket}", "-serial", "chardev:console",
        ]  # fmt: skip

    def spawn(self) -> subprocess.Popen[bytes]:
        self.listen()
        process = super().spawn()
        self.accept()
        return process

    def start(self) -> Machine:
        super().start()
        try:
            if not self.incoming:
                self.wait_for("guest: mounted", BOOT_S_MAX)
        except BaseException:
            self.abandon()
            raise
        return self

    def is_ready(self) -> bool:
        """QEMU answers, so it has begun to wait for whatever is to come in."""
        with contextlib.suppress(OSError), Qmp(self.qmp_path):
            return True
        return False

    def stop(self) -> None:
        """As pulling the plug; a test that wants an orderly end has had it before."""
        try:
            if self.process is not None:
                self.check()
            super().stop()
        finally:
            self._close()

    def kill(self) -> None:
        super().kill()
        self._close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._listen()
        super().abandon()
        sys.stderr.write(f"--- its console\n{self.transcript[-5000:]}")

    def _close(self) -> None:
        self.hang_up()
        if self._qmp is not None:
            self._qmp.close()

    def wait_off(self) -> None:
        assert self.process is not None
        assert self.process.wait(WAIT_S_MAX) == 0

    # QMP

    @property
    def qmp(self) -> Qmp:
        if self._qmp is None:
            self._qmp = Qmp(self.qmp_path)
        return self._qmp


# Disks


def make_disk(path: Path, size: int = DISK_BYTES, *, seed: int = 1) -> Path:
    """An ext4 file system with something in it, so that there is something to mirror."""
    content = path.with_suffix(".content")
    content.mkdir()
    (content / "noise").write_bytes(random.Random(seed).randbytes(size // 4))
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", content, path, f"{size // 1024}k")
    shutil.rmtree(content)
    return path


def check_disk(image: Path, transcript: str, *, torn_max: int = 0) -> None:
    """The file system is whole, and each file is what `transcript` says last.

    If `torn_max` is given the image is of a moment when the guest was writing, after what the
    transcript says. Then its journal is replayed first, in a copy, as whoever mounts it would do;
    files may be later ones; and so many, those that were being written, may be broken or missing.
    """
    copy = image.with_name(image.name + ".check")
    run("cp", "--sparse=always", image, copy)
    if torn_max:
        run("e2fsck", "-E", "journal_only", "-y", copy, check=False)
    run("e2fsck", "-f", "-n", copy)
    files = copy.with_name(copy.name + ".files")
    files.mkdir()
    run("debugfs", "-R", f"rdump /files {files}", copy)
    said = {line.split()[0]: (line, number) for line, number in WROTE.findall(transcript)}
    assert said, "the guest has written nothing"
    wrong = []
    for name, (line, number) in said.items():
        found = _first_line(files / "files" / name)
        if found != line and not (torn_max and found and found.split()[1] > number):
            wrong.append(name)
    assert len(wrong) <= torn_max, f"these differ from what the guest wrote: {wrong}"
    shutil.rmtree(files)
    os.unlink(copy)


def _first_line(path: Path) -> str:
    """If the rest is what it says it is; else ""."""
    if not path.exists():
        return ""
    first, _, rest = path.read_bytes().partition(b"\n")
    line = first.decode(errors="replace")
    return line if line.endswith(f" {hashlib.md5(rest).hexdigest()}") else ""
