"""Makes the state directories beside this file, with the nbdmirror of a checkout of 4f3aa63:

    git worktree add --detach /tmp/v1 4f3aa63
    .venv/bin/python tests/data/state-v1/make.py /tmp/v1

README.md says what is in them. They were made once, and are not made again: that old files are read
is what they are for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1]
sys.path.insert(0, str(TESTS))

# What follows is found by the path above, hence E402.
import nbd  # noqa: E402
from integration.state.stateparts import settle  # noqa: E402
from support.clients import connected  # noqa: E402
from support.fixtures import temporary_folder  # noqa: E402
from support.images import KiB, MiB, make_image, make_noise  # noqa: E402
from support.kept import Kept  # noqa: E402
from support.servers import QemuNbd  # noqa: E402
from support.waiting import wait_until  # noqa: E402

SIZE = 4 * MiB
GRANULE = 64 * KiB
CELL = 16
"""Memory is written down in pieces of so many bytes, those that are not zero."""
CHECKOUT = Path(sys.argv[1]).resolve() if __name__ == "__main__" else Path()


class OldServer(Kept):
    """Of the checkout."""

    def environment(self) -> dict[str, str]:
        places = [str(CHECKOUT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}


def add_bitmap(server: Kept, name: str, **options: object) -> None:
    server.qmp.execute(
        "block-dirty-bitmap-add", node="vda", name=name, granularity=GRANULE, persistent=True,
        **options,
    )  # fmt: skip


def write(server: Kept, *granules: int) -> None:
    with connected(server.uri()) as guest:
        for number in granules:
            guest.pwrite(bytes([number + 1]) * 1000, number * GRANULE + 500)
        guest.flush()


def begin(server: Kept, target: QemuNbd, **options: object) -> None:
    server.qmp.add_target("t", target)
    server.qmp.start_mirror("t", device="vda", granularity=GRANULE, **options)


def end_hung(server: Kept, target: QemuNbd, *granules: int) -> None:
    """Killed while what was written is in flight to a target that does not answer."""
    os.kill(target.pid, signal.SIGSTOP)
    write(server, *granules)
    wait_until(lambda: server.job_status()["in-flight-bytes"], "copies are in flight")
    server.kill()
    target.kill()


# The cases. Each returns what is known of its bitmaps: name -> granules that are dirty.

Bitmaps = dict[str, list[int]]


def first_copy(server: Kept, target: QemuNbd) -> Bitmaps:
    """A mirror that is killed in its first copy, some of which is done and flushed."""
    begin(server, target, speed=256 * KiB, buf_size=GRANULE, on_target_error="stop")
    wait_until(lambda: server.qmp.job()["offset"] >= 8 * GRANULE, "a part is copied", 60)
    settle(server)
    write(server, 0, 1, 40)
    server.kill()
    target.kill()
    return {}


def ready(server: Kept, target: QemuNbd) -> Bitmaps:
    """A mirror that is killed after READY, paused by nobody, with copies in flight."""
    begin(server, target, auto_dismiss=False)
    server.qmp.wait_ready()
    settle(server)
    end_hung(server, target, 3, 17, 63)
    return {}


def pivot(server: Kept, target: QemuNbd) -> Bitmaps:
    """A disk that was moved to the target; its server is killed afterwards."""
    begin(server, target)
    server.qmp.wait_ready()
    server.qmp.complete()
    server.kill()
    target.kill()
    return {}


def pivot_with_bitmap(server: Kept, target: QemuNbd) -> Bitmaps:
    """The same, of a disk with a persistent bitmap, with guests before and after."""
    add_bitmap(server, "b")
    write(server, 5)
    begin(server, target)
    server.qmp.wait_ready()
    server.qmp.complete()
    write(server, 6)
    server.kill()
    target.kill()
    return {"b": [5, 6]}


def bitmaps(server: Kept, target: QemuNbd) -> Bitmaps:
    """Persistent bitmaps, one of which does not record; killed."""
    add_bitmap(server, "b")
    add_bitmap(server, "off", disabled=True)
    write(server, 2, 30, 31)
    server.kill()
    target.kill()
    return {"b": [2, 30, 31], "off": []}


def orderly_end(server: Kept, target: QemuNbd) -> Bitmaps:
    """A mirror that was READY, with all copied and flushed, and a bitmap; SIGTERM."""
    add_bitmap(server, "b")
    write(server, 9, 10)
    begin(server, target, copy_mode="write-blocking")
    server.qmp.wait_ready()
    server.stop()
    target.stop()
    return {"b": [9, 10]}


def requests_under_way(server: Kept, target: QemuNbd) -> Bitmaps:
    """Killed while a guest's write waited for a target that does not answer: the write stands in
    the journal."""
    begin(server, target, copy_mode="write-blocking")
    server.qmp.wait_ready()
    settle(server)
    os.kill(target.pid, signal.SIGSTOP)

    def write_in_vain() -> None:
        with contextlib.suppress(nbd.Error), connected(server.uri()) as guest:
            guest.pwrite(b"w" * 2 * GRANULE, 20 * GRANULE + 100)

    writer = threading.Thread(target=write_in_vain)
    writer.start()
    place = Path(str(server.definition()["memory"]))
    wait_until(lambda: any((place / "journal").read_bytes()), "the write is under way")
    wait_until(lambda: server.job_status()["in-flight-bytes"], "the target has been written to")
    server.kill()
    writer.join()
    target.kill()
    return {}


CASES = (
    first_copy, ready, pivot, pivot_with_bitmap, bitmaps, orderly_end, requests_under_way,
)  # fmt: skip


def memory_of(state: Path) -> dict[str, Any]:
    """What the server has left in /dev/shm, where it is not zero."""
    definition = state / "vda.json"
    if not definition.exists():
        return {}
    folder = json.loads(definition.read_text().partition("\n")[2])["memory"]
    if not folder:
        return {}
    contents = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return {
        name: {
            "length": len(content),
            "hex by offset": {
                at: content[at : at + CELL].hex()
                for at in range(0, len(content), CELL)
                if any(content[at : at + CELL])
            },
        }
        for name, content in contents.items()
    }


def differing(disk: Path, target: Path) -> list[int]:
    one, other = disk.read_bytes(), target.read_bytes()
    starts = range(0, SIZE, GRANULE)
    return [at // GRANULE for at in starts if one[at : at + GRANULE] != other[at : at + GRANULE]]


def make(case: Callable[[Kept, QemuNbd], Bitmaps], folder: Path) -> None:
    disk = make_image(folder / "disk.img", SIZE)
    target = QemuNbd(folder, make_noise(folder / "target.img", SIZE)).start()
    server = OldServer(folder, disk)
    server.allowed.append(".*")
    server.start()
    known = case(server, target)
    place = HERE / case.__name__.replace("_", "-")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(server.state, place / "state", ignore=shutil.ignore_patterns("lock"))
    about = {
        "size": SIZE,
        "granule": GRANULE,
        "disk": str(disk),
        "target": target.uri(),
        "disk mtime ns": disk.stat().st_mtime_ns,
        "differing granules": differing(disk, target.image),
        "bitmaps": known,
        "memory": memory_of(server.state),
    }
    text = re.sub(
        r"\[[\s\d,]*\]", lambda found: " ".join(found[0].split()), json.dumps(about, indent=1)
    )
    (place / "about.json").write_text(f"{text}\n")


def main() -> None:
    os.chdir(CHECKOUT)
    for case in CASES:
        with temporary_folder() as folder:
            make(case, folder)


if __name__ == "__main__":
    main()
