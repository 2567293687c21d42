"""Plain NBD clients: a connection, its errno, and how many a server has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd
from support.waiting import InThread


def connections(socket: Path) -> int:
    """How many are open to a server that listens on this Unix socket."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(line.endswith(f" {socket}") for line in lines) - 1  # one is the listener's


@contextlib.contextmanager
def connected(uri: str) -> Iterator[nbd.NBD]:
    """A libnbd handle with base:allocation, in strict mode off: the server is to be asked
    anything."""
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.set_strict_mode(0)
    handle.set_uri_allow_local_file(True)  # keys of TLS
    handle.connect_uri(uri)
    try:
        yield handle
    finally:
        if handle.aio_is_ready():
            handle.shutdown()


def requested(uri: str, request: Callable[[nbd.NBD], object]) -> InThread:
    """A guest's request, in a thread: it may hang for as long as the test wants."""

    def call() -> None:
        with connected(uri) as guest:
            request(guest)

    return InThread(call)


def nbd_errno(call: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    """The errno that the server answers with; 0 where it succeeds."""
    try:
        call(*arguments, **options)
    except nbd.Error as error:
        return int(error.errnum)
    return 0
