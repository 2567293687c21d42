"""The target that forgets is what the tests take it for."""

from __future__ import annotations

from pathlib import Path

import nbd
import pytest
from support.clients import connected
from support.fixtures import Start
from support.images import MiB, make_noise
from support.losing import Lossy

BLOCK = 4096
NEW = b"\x11" * BLOCK


@pytest.mark.parametrize("multi_conn", [True, False])
def test_what_was_flushed_survives_a_kill_and_the_rest_does_not(
    start: Start, folder: Path, multi_conn: bool
) -> None:
    image = make_noise(folder / "t.img", MiB)
    old = image.read_bytes()
    target = start(Lossy(folder, image, multi_conn=multi_conn))
    with connected(target.uri()) as client:
        assert client.can_multi_conn() == multi_conn
        client.pwrite(NEW, 0)
        client.zero(BLOCK, BLOCK)
        client.trim(BLOCK, 2 * BLOCK)
        assert image.read_bytes() == old
        client.flush()
        client.pwrite(NEW, 4 * BLOCK, nbd.CMD_FLAG_FUA)
        client.zero(BLOCK, 5 * BLOCK, nbd.CMD_FLAG_FUA)
        flushed = NEW + bytes(2 * BLOCK) + old[3 * BLOCK : 4 * BLOCK] + NEW + bytes(BLOCK)
        flushed += old[6 * BLOCK :]
        assert image.read_bytes() == flushed
        client.pwrite(NEW, 8 * BLOCK)
        client.zero(BLOCK, 0)
        client.trim(BLOCK, 4 * BLOCK)
        assert client.pread(BLOCK, 8 * BLOCK) == NEW
        assert client.pread(BLOCK, 0) == client.pread(BLOCK, 4 * BLOCK) == bytes(BLOCK)
        target.kill()
    target.come_back()
    with connected(target.uri()) as client:
        assert client.pread(MiB, 0) == flushed
    assert image.read_bytes() == flushed


@pytest.mark.parametrize("extents", [True, False])
def test_it_tells_its_zeroes(start: Start, folder: Path, extents: bool) -> None:
    target = start(Lossy(folder, make_noise(folder / "t.img", MiB), extents=extents))
    found: list[int] = []

    def note(context: str, offset: int, entries: list[int], error: object) -> int:
        found.extend(entries)
        return 0

    with connected(target.uri()) as client:
        client.zero(BLOCK, BLOCK)
        assert client.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        client.block_status(MiB, 0, note)
    if extents:
        assert found[:4] == [BLOCK, 0, BLOCK, nbd.STATE_ZERO]
    else:
        assert found == [MiB, 0]


def test_it_does_as_ordered(start: Start, folder: Path) -> None:
    target = start(Lossy(folder, make_noise(folder / "t.img", MiB)))
    with connected(target.uri()) as client:
        target.order("fail flush 1")
        client.pwrite(NEW, 0)
        with pytest.raises(nbd.Error):
            client.flush()
        client.flush()
        target.order("kill write 2")
        client.pwrite(NEW, BLOCK)
        with pytest.raises(nbd.Error):
            client.pwrite(NEW, 2 * BLOCK)
    target.wait_killed()
    assert target.changed() == [(0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, BLOCK)]
    assert [kind for kind, _, _ in target.requests()].count("flush") == 2
    target.come_back()
