"""A server that is tried as a target and as a source, and its row of docs/targets.md."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import nbd
import pytest
from support.clients import connected
from support.fixtures import Start
from support.guests import Guest
from support.images import KiB, MiB, allocated_bytes, assert_identical, make_noise
from support.knownservers import SIZE, Target
from support.processes import ROOT, run
from support.qmpclient import Refused
from support.serverprocess import Server
from support.servers import Nbdmirror, QemuNbd

DATA_BYTES = MiB
"""What a source holds; the rest is a hole."""
REQUESTS = 40
SLOW_S = 0.02
TABLE = (ROOT / "docs" / "targets.md").read_text()


def try_target(target: Target, folder: Path, start: Start) -> None:
    """As a mirror's target under a guest, then as a source. Its row must say what was found."""
    told = row_of(target.title)
    disk = make_sparse(folder / "disk.img")
    behind = start(target.make(folder, make_noise(folder / "target.img", SIZE)))
    able = abilities(behind.uri())
    front = start(Nbdmirror(folder, disk, bare=True))
    if target.refusal:
        with pytest.raises(Refused, match=target.refusal):
            front.qmp.start_mirror(behind.uri())
        assert_identical(disk, front.uri())
        row = [target.title, "refused", "-", *able]
    else:
        front.qmp.start_mirror(behind.uri())
        front.qmp.wait_ready()
        row = [target.title, "yes", is_sparse(target, folder, behind, able), *able]
        with Guest(front.uri(), disk, connections=2) as guest:
            guest.wait_for_requests(REQUESTS)
            front.qmp.complete()
            guest.wait_for_requests(REQUESTS)
        assert_identical(guest.model, front.uri())
        front.stop()
        assert_identical(guest.model, behind.uri())
        use_as_source(behind, guest.model, folder, start)
    if is_documented() or not told:
        assert told == row, f"docs/targets.md: | {' | '.join(row)} | |"


def use_as_source(behind: Server, content: bytearray, folder: Path, start: Start) -> None:
    """Served, written to, and mirrored from. The guest is slow: so may the server be."""
    front = start(Nbdmirror(folder, behind.uri(), bare=True))
    copy = start(QemuNbd(folder, make_noise(folder / "copy.img", SIZE)))
    with Guest(front.uri(), content, pause_s=SLOW_S) as guest:
        guest.wait_for_requests(REQUESTS)
        front.qmp.start_mirror(copy.uri())
        front.qmp.wait_ready()
        front.qmp.complete()
        guest.wait_for_requests(REQUESTS)
    assert_identical(guest.model, copy.uri())
    front.stop()


@functools.cache
def is_documented() -> bool:
    """Whether these are the servers that the table is about: others may have learnt something."""
    versions = {
        "QEMU": version("qemu-nbd", "--version"),
        "nbdkit": version("nbdkit", "--version"),
        "nbd-server": version("nbd-server", "-V"),
    }
    told = re.search(r"QEMU ([\d.]+), nbdkit ([\d.]+), nbd-server ([\d.]+)", TABLE)
    assert told, "docs/targets.md names the versions"
    return told.groups() == tuple(versions.values())


def version(*command: str) -> str:
    done = run(*command, check=False)
    match = re.search(r"\d+\.\d+", done.stdout + done.stderr)
    assert match, command
    return match[0]


def row_of(title: str) -> list[str]:
    """The cells of its row, but for the remarks."""
    for line in TABLE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if cells[0] == title:
            return cells[:-1]
    return []


def abilities(uri: str) -> list[str]:
    """As the table has them."""
    with connected(uri) as handle:
        marks = [
            handle.can_multi_conn(),
            handle.can_fua(),
            handle.can_zero(),
            handle.can_trim(),
            handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION),
        ]
        kinds = (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)
        sizes = [handle.get_block_size(kind) for kind in kinds]
    blocks = " / ".join(map(in_units, sizes)) if any(sizes) else "not told"
    return [*("yes" if mark else "no" for mark in marks), blocks]


def in_units(size: int) -> str:
    for unit, scale in (("M", MiB), ("K", KiB)):
        if size and size % scale == 0:
            return f"{size // scale}{unit}"
    return "4G - 1" if size == 2**32 - 1 else str(size)


def make_sparse(path: Path) -> Path:
    """Noise at odd places, together DATA_BYTES, and holes."""
    noise = make_noise(path, DATA_BYTES, seed=5).read_bytes()
    with path.open("wb") as file:
        file.truncate(SIZE)
        for number in range(8):
            piece = DATA_BYTES // 8
            file.seek(number * MiB + number * 5000)
            file.write(noise[number * piece : (number + 1) * piece])
    return path


def is_sparse(target: Target, folder: Path, server: Server, able: list[str]) -> str:
    """Whether holes of the source are holes of the target, where noise was before."""
    if target.file:
        allocated = allocated_bytes(folder / target.file)
        whole = (folder / target.file).stat().st_size
    elif able[4] == "yes":
        lines = run("nbdinfo", "--map", "--totals", server.uri()).stdout.splitlines()
        allocated = sum(int(line.split()[0]) for line in lines if "data" in line)
        whole = SIZE
    else:
        return "-"
    return "yes" if allocated < whole / 2 else "no"
