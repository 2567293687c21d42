"""Two hosts, A and B, each with its disk and a server whose command never changes."""

from __future__ import annotations

import errno
from pathlib import Path

import nbd
from integration.state.stateparts import GRANULE, SIZE
from support.clients import connected, nbd_errno
from support.images import assert_identical
from support.kept import Kept

REFUSED = "is not the disk any more"
QUIET = "WARNING|target only|reset by peer|read data: NBD_CMD_WRITE"
"""What a target only logs: its role, requests that it refuses, and what a client was sending that
was killed."""


def image(server: Kept) -> Path:
    return Path(server.disks[0].partition("=")[2])


def begin(here: Kept, there: Kept, **options: object) -> None:
    sync = {"sync": "full", "granularity": GRANULE} | options
    here.qmp.execute(
        "drive-mirror", device="vda", job_id="j", target=there.uri("vda"), mode="existing", **sync
    )


def move(here: Kept, there: Kept) -> None:
    """Both sides are alike then, and `here` has ended in order."""
    begin(here, there)
    here.qmp.wait_ready()
    here.qmp.complete()
    here.stop()
    assert_identical(image(here), image(there))


def write(server: Kept, text: bytes, offset: int = 0) -> None:
    with connected(server.uri("vda")) as guest:
        guest.pwrite(text, offset)
        guest.flush()


def read(server: Kept, length: int, offset: int = 0) -> bytes:
    with connected(server.uri("vda")) as guest:
        return bytes(guest.pread(length, offset))


def start_as_target(server: Kept) -> None:
    server.allowed.append(QUIET)
    server.restart()
    assert role(server)


def role(server: Kept) -> str:
    disk = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]
    return str(disk.get("target-only", ""))


def gone_to(a: Kept, b: Kept) -> None:
    """The disk is on B, where a guest goes on, and A has ended."""
    write(a, b"old")
    move(a, b)
    write(b, b"new")


def refuses_all(guest: nbd.NBD) -> bool:
    """Whether each kind of request fails with EPERM; or none does."""
    answers = {
        nbd_errno(guest.pread, 512, 0),
        nbd_errno(guest.pread, 1, SIZE - 1),
        nbd_errno(guest.pwrite, b"x" * 512, 4096),
        nbd_errno(guest.pwrite, b"x" * 512, 4096, nbd.CMD_FLAG_FUA),
        nbd_errno(guest.zero, 4096, 8192),
        nbd_errno(guest.trim, 4096, 8192),
        nbd_errno(guest.cache, 512, 0),
        nbd_errno(guest.block_status, SIZE, 0, lambda *_: 0),
        nbd_errno(guest.flush),
    }
    assert answers in ({errno.EPERM}, {0})
    return bool(answers.pop())


def server_id(server: Kept) -> str:
    handle = nbd.NBD()
    handle.set_full_info(True)
    handle.connect_uri(server.uri("x-nbdmirror-side/x/vda"))
    text = str(handle.get_export_description())
    handle.shutdown()
    return text.split(" ")[1]


def way_in(server: Kept, asker: str) -> str:
    return server.uri(f"x-nbdmirror-home/{asker}/vda")
