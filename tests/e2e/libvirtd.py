"""libvirt, and a guest that it runs: a domain whose disk is the one under test."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from e2e.guest import BOOT_S_MAX, KERNEL_WORDS, Console
from e2e.guestparts import CACHE, NoGuestHere, guest_parts
from support.processes import run
from support.serverprocess import Server
from support.waiting import wait_until

QEMU_USER = 64055
"""Debian's number of libvirt-qemu, the user and the group."""


def let_qemu_in(path: Path) -> None:
    """As docs/libvirt.md has it: the server's socket is its own user's alone."""
    os.chown(path, -1, QEMU_USER)
    path.chmod(0o770)


DOMAIN = """\
<domain type='{type}'>
  <name>guest</name>
  <memory unit='MiB'>128</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{words}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>{emulator}</emulator>
    {disk}
    <serial type='unix'><source mode='connect' path='{console}'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"""


class Libvirtd(Server):
    """`virsh` gives it a command and returns what it says."""

    name = "libvirtd"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if os.geteuid():
            pytest.skip("libvirt's system daemon is root's")

    def argv(self) -> list[str]:
        namespaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
        init = Path(__file__).with_name("libvirt_init.sh")
        return [
            *namespaces,
            "--mount-proc",
            "sh",
            str(init),
            str(QEMU_USER),
            str(CACHE / "libvirt"),
        ]

    def is_ready(self) -> bool:
        with contextlib.suppress(AssertionError, OSError, IndexError):
            return bool(self.virsh("uri"))
        return False

    def virsh(self, *words: str | Path) -> str:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        inside = ("nsenter", "--mount", "--pid", f"--target={children.split()[0]}")
        return run(*inside, "virsh", "-c", "qemu:///system", *words, timeout_s=60).stdout

    def stop(self) -> None:
        """With all in its namespace; it has nothing to keep."""
        self.kill()


class Domain(Console):
    """A guest that libvirt runs. `disk` is the XML of its disk. `start` as with a server."""

    name = "domain"
    layer = 2

    def __init__(self, folder: Path, libvirtd: Libvirtd, disk: str) -> None:
        super().__init__(folder / "console.sock")
        try:
            self.parts = guest_parts()
        except NoGuestHere as error:
            pytest.skip(str(error))
        self._folder = folder
        self._libvirtd = libvirtd
        self._disk = disk

    def start(self) -> Domain:
        self._folder.chmod(0o755)
        xml = self._folder / "domain.xml"
        xml.write_text(
            DOMAIN.format(
                type={"tcg": "qemu"}.get(self.parts.accelerator, "kvm"),
                # Copies, for the checkout may be where QEMU's user may not look.
                kernel=shutil.copy(self.parts.kernel, self._folder),
                initramfs=shutil.copy(self.parts.initramfs, self._folder),
                words=f"{KERNEL_WORDS} disk=vda",
                emulator=shutil.which("qemu-system-x86_64"),
                disk=self._disk,
                console=self._path,
            )
        )
        self.listen()
        self._libvirtd.virsh("create", xml)
        self.accept()
        self.wait_for("guest: mounted", BOOT_S_MAX)
        return self

    def wait_off(self) -> None:
        wait_until(lambda: "guest" not in self._libvirtd.virsh("list", "--name"), "it is off")

    def stop(self) -> None:
        self.hang_up()

    abandon = stop
