"""A target that comes back as another disk, or as an older copy of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Identical
from support.images import make_noise
from support.losing import GRANULE, SIZE, Lossy, end, ready
from support.seeds import SEED
from support.servers import Nbdmirror
from support.waiting import wait_until

CANCEL = "block-job-cancel"


@pytest.mark.rule(40)
@pytest.mark.guarantee("A target that was lost and came back")
@pytest.mark.parametrize("change", ["all of it", "its first bytes", "zeroes"])
def test_another_disk_of_the_same_size_is_noticed(
    server: Nbdmirror, target: Lossy, disk: Path, identical: Identical, change: str
) -> None:
    """What was the same on both sides is not any more: it is not written to, and waited for."""
    qmp = ready(server, target.uri())
    target.kill()
    before = target.image.read_bytes()
    if change == "all of it":
        make_noise(target.image, SIZE, SEED + 7)
    elif change == "zeroes":
        target.image.write_bytes(bytes(SIZE))
    else:
        with target.image.open("r+b") as file:
            file.write(b"another disk's label")
    other = target.image.read_bytes()
    mark = target.mark()
    server.allowed.append("came back changed|connection lost")
    target.come_back()
    wait_until(lambda: "it is another disk" in server.stderr, "it is noticed")
    assert target.changed(mark) == [] and target.image.read_bytes() == other
    target.kill()
    target.image.write_bytes(before)
    target.come_back()
    end(qmp, CANCEL)
    identical(disk, target.image)


@pytest.mark.rule(40)
def test_an_older_copy_is_refused_however_often_it_is_tried(
    server: Nbdmirror, target: Lossy, disk: Path, identical: Identical
) -> None:
    """A backup of the target from before a guest's last write, which is one place of many."""
    qmp = ready(server, target.uri(), reconnect_delay_s=60)
    older = target.image.read_bytes()
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"g" * GRANULE, SIZE // 2)
    wait_until(lambda: target.image.read_bytes() == disk.read_bytes(), "the write is flushed")

    def unflushed_bytes() -> int:
        status = qmp.execute("x-nbdmirror-query-status")
        return int(status["disks"][0]["jobs"][0]["unflushed-bytes"])

    wait_until(lambda: not unflushed_bytes(), "the flush is over")
    target.kill()
    right = target.image.read_bytes()
    target.image.write_bytes(older)
    mark = target.mark()
    server.allowed.append("came back changed|connection lost")
    target.come_back()

    def attempts() -> int:
        return sum(kind == "read" and not offset for kind, offset, _ in target.requests(mark))

    wait_until(lambda: attempts() >= 4, "four attempts")
    assert f"the data at {SIZE // 2} differs" in server.stderr
    target.kill()
    assert target.changed(mark) == [] and target.image.read_bytes() == older
    target.image.write_bytes(right)
    target.come_back()
    end(qmp, CANCEL)
    identical(disk, target.image)
