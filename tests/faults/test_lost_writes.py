"""An NBD server that a disk is served from loses writes that guests had not flushed.

An increment may have them, so the disk's dirty bitmaps must not say that nothing has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Start
from support.images import MiB, make_image, make_noise
from support.losing import GRANULE, SIZE, Lossy, end
from support.seeds import SEED
from support.servers import Nbdmirror, QemuNbd

BLOCK = 4096
DATA = b"\x5a" * BLOCK
LOST = r"connection lost|not flushed|lost: |Failed to connect|no answer|WARNING"


@pytest.fixture
def source(start: Start, folder: Path) -> Lossy:
    return start(Lossy(folder, make_image(folder / "disk.img", SIZE, SEED)))


def lost_bytes(source: Lossy, server: Nbdmirror, disk: str, node: str) -> int:
    """What a bitmap of the disk has as dirty after its server has lost one write."""
    server.qmp.execute("block-dirty-bitmap-add", node=node, name="b")
    with connected(server.uri(disk)) as guest:
        guest.pwrite(DATA, MiB)
        source.kill()
        source.come_back()
        guest.pread(BLOCK, 0)
    (found,) = [
        bitmap["count"]
        for info in server.qmp.execute("query-named-block-nodes")
        for bitmap in info.get("dirty-bitmaps", [])
        if bitmap.get("name") == "b"
    ]
    return int(found)


@pytest.mark.parametrize("is_mirrored", [False, True], ids=["never mirrored", "mirrored before"])
def test_what_the_source_has_lost_is_in_the_disks_bitmaps(
    source: Lossy, start: Start, folder: Path, is_mirrored: bool
) -> None:
    server = start(Nbdmirror(folder, f"src={source.uri()}", bare=True))
    server.allowed.append(LOST)
    if is_mirrored:
        target = start(QemuNbd(folder, make_noise(folder / "target.img", SIZE, SEED + 1)))
        server.qmp.add_target("tgt", target)
        server.qmp.start_mirror("tgt", device="src", granularity=GRANULE)
        server.qmp.wait_ready()
        end(server.qmp, "block-job-cancel")
    assert lost_bytes(source, server, "src", "src") == SIZE


def test_what_the_source_has_lost_after_a_pivot_is_in_its_bitmaps(
    source: Lossy, start: Start, folder: Path
) -> None:
    server = start(Nbdmirror(folder, f"src={make_image(folder / 'first.img', SIZE, SEED)}"))
    server.allowed.append(LOST)
    server.qmp.add_target("tgt", source)
    server.qmp.start_mirror("tgt", device="src", granularity=GRANULE)
    server.qmp.wait_ready()
    end(server.qmp, "block-job-complete")
    assert lost_bytes(source, server, "src", "tgt") == SIZE
