"""What a guest is made of, made once and kept in .cache/guest: a kernel and an initramfs.

Both come from Debian's packages, which are downloaded and unpacked, not installed: the kernel is
for the guest alone, and busybox-static would push the host's busybox out. `./run setup` does this
by running this file; the tests do it as well, for who calls pytest by hand.
"""

from __future__ import annotations

import functools
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from support.debianpackages import PackagesError, command, download

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache" / "guest"
INIT = Path(__file__).with_name("guest_init.sh")

KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "nbd",
)
"""In the order in which they need one another. Some kernels have some of these built in; all have
ext4 and the serial console."""

HOST_PROGRAMS = ("nbd-client", "sqlite3")
"""Programs of the host's that a guest needs, and which busybox has not."""

KERNEL_PARTS = re.compile(r"linux-(image|base|binary|modules)-\d\S*")
"""Of which packages a kernel of one version consists: of the first alone, or of all."""

PICKED = re.compile(
    rf"\./(?:.*/({'|'.join(MODULES)})\.ko(\.xz)?|.*/(vmlinuz)(?:-.*)?|.*/(modules\.builtin)"
    r"|(?:usr/)?bin/(busybox))"
)
"""The files that a guest needs, in the packages."""

TRIAL_S_MAX = 10.0


class GuestPartsError(PackagesError):
    """There is no guest, and there should be; the text says why, in one line."""


class NoGuestHere(GuestPartsError):
    """There can be no guest on this system."""


@dataclass(frozen=True, slots=True)
class Parts:
    kernel: Path
    initramfs: Path
    accelerator: str
    """QEMU's name for it: kvm or tcg."""


@functools.cache
def guest_parts() -> Parts:
    """All that there must be to boot a guest; what is missing is made. Raises PackagesError."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise NoGuestHere("guests are made of Debian's packages, and there is no apt-get")
    if (machine := os.uname().machine) != "x86_64":
        raise NoGuestHere(f"guests are made for x86_64, and this is {machine}")
    if not shutil.which("qemu-system-x86_64"):
        raise GuestPartsError("qemu-system-x86_64 is missing; ./run setup installs it")
    unpacked = CACHE / "unpacked"
    if not unpacked.exists():
        _unpack_packages(unpacked)
    kernel, initramfs = unpacked / "vmlinuz", CACHE / "initramfs"
    _replace(initramfs, _initramfs(unpacked))
    return Parts(kernel, initramfs, _accelerator(kernel, initramfs))


# Packages


def _unpack_packages(place: Path) -> None:
    """The kernel, its modules and busybox, flat in one folder that is there whole or not at all."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        folder = Path(scratch)
        download(lambda: [*_kernel_packages(), BUSYBOX_PACKAGE], folder)
        parts = folder / "parts"
        parts.mkdir()
        for package in folder.glob("*.deb"):
            _pick(package, parts)
        there = {path.name for path in parts.iterdir()}
        if "modules.builtin" in there:
            built_in = (parts / "modules.builtin").read_text().split()
            there.update(Path(name).name for name in built_in)
        if missing := {"vmlinuz", "busybox", *(f"{name}.ko" for name in MODULES)} - there:
            raise GuestPartsError(f"Debian's packages lack {', '.join(sorted(missing))}")
        try:
            parts.rename(place)
        except OSError:
            if not place.exists():  # else another run was quicker
                raise


def _kernel_packages() -> list[str]:
    """What the package of no version depends on, itself or by others."""
    text = command("apt-cache", "depends", "--recurse", "--important", KERNEL_PACKAGE, folder=ROOT)
    found = [line for line in text.splitlines() if KERNEL_PARTS.fullmatch(line)]
    if not found:
        raise GuestPartsError(f"apt knows no package {KERNEL_PACKAGE}")
    return found


def _pick(package: Path, place: Path) -> None:
    """Take what the guest needs out of one package."""
    with (
        subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
        ) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as archive,
    ):
        for member in archive:
            match = PICKED.fullmatch(member.name)
            content = archive.extractfile(member) if match and member.isfile() else None
            if match and content:
                module, compressed, *others = match.groups()
                data = content.read()
                name = f"{module}.ko" if module else next(filter(None, others))
                (place / name).write_bytes(lzma.decompress(data) if compressed else data)


# The initramfs: a cpio archive in the kernel's "newc" format


def _initramfs(unpacked: Path) -> bytes:
    folders = ("bin", "dev", "proc", "sys", "tmp", "mnt", "modules")
    archive = [_entry(name, stat.S_IFDIR | 0o755) for name in folders]
    archive.append(_entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    archive.append(_entry("init", stat.S_IFREG | 0o755, INIT.read_bytes()))
    archive.append(_entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox"))
    files = [("bin/busybox", unpacked / "busybox")]
    modules = [f"{name}.ko" for name in MODULES]
    files += [
        (f"modules/{name}", unpacked / name) for name in modules if (unpacked / name).exists()
    ]
    programs = dict(file for name in HOST_PROGRAMS for file in _program(name))
    for name, path in [*files, *programs.items()]:
        archive.append(_entry(name, stat.S_IFREG | 0o755, path.read_bytes()))
    return b"".join([*archive, _entry("TRAILER!!!", 0)])


def _program(name: str) -> Iterable[tuple[str, Path]]:
    """One of those, and the libraries that it loads."""
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    program = shutil.which(name, path=search)
    if not program:
        raise GuestPartsError(f"{name} is missing; ./run setup installs it")
    libraries = re.findall(r"(?:=> |^\s*)(/\S+) \(", command("ldd", program, folder=ROOT), re.M)
    yield f"bin/{name}", Path(program)
    for library in libraries:
        # The loader has one place, and looks into the others by default.
        yield (
            (library if "ld-linux" in library else f"/lib/{Path(library).name}")[1:],
            Path(library),
        )


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One file. Its folders are made first, as far as the kernel does not know them: it makes
    none by itself, and making one twice is no error."""
    folders = [str(folder) for folder in Path(name).parents if str(folder) != "."]
    made = b"".join(
        _record(folder, stat.S_IFDIR | 0o755, b"", (0, 0)) for folder in reversed(folders)
    )
    return made + _record(name, mode, data, device)


def _record(name: str, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    path = os.fsencode(name) + b"\0"
    inode, owner, group, links, time, check = 0, 0, 0, 1, 0, 0
    fields = [inode, mode, owner, group, links, time, len(data), 0, 0, *device, len(path), check]
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return _padded(header) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _replace(path: Path, content: bytes) -> None:
    """At once, for whoever runs at the same time."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
        os.fchmod(file.fileno(), 0o644)
    os.replace(file.name, path)


# The accelerator


def machine_options(kernel: Path, initramfs: Path, accelerator: str) -> list[str]:
    """QEMU with little more than Linux needs. Not microvm, which boots no faster: it has no clock
    but the PIT, and on a busy host Linux hangs when it cannot calibrate its own by that."""
    return [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-machine", "q35", "-accel", accelerator, "-cpu", "max", "-m", "128M",
        "-kernel", str(kernel), "-initrd", str(initramfs),
    ]  # fmt: skip


def _accelerator(kernel: Path, initramfs: Path) -> str:
    """KVM, if it can boot this kernel: a /dev/kvm may be there and be of no use. The answer is
    kept until the machine is booted again."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    known = CACHE / "accelerator"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    if known.exists() and known.read_text().startswith(boot):
        return known.read_text().split()[1]
    accelerator = "kvm" if _boots(machine_options(kernel, initramfs, "kvm")) else "tcg"
    _replace(known, f"{boot} {accelerator}".encode())
    return accelerator


def _boots(machine: list[str]) -> bool:
    words = ["-serial", "stdio", "-append", "console=ttyS0 panic=-1 quiet mode=trial"]
    try:
        done = subprocess.run(
            [*machine, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TRIAL_S_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return b"guest: up" in done.stdout


if __name__ == "__main__":
    try:
        guest_parts()
    except NoGuestHere as error:
        sys.stderr.write(f"run: tests with virtual machines will be skipped: {error}\n")
    except PackagesError as error:
        sys.exit(f"run: cannot make virtual machines for the tests: {error}")
