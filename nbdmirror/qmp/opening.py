"""Connects to NBD servers for commands, and reads from them, on helper threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from nbdmirror.errors import CommandError, ConfigError
from nbdmirror.identity import socket_file
from nbdmirror.limits import TARGET_TIMEOUT_S_MAX
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.pool import CONNECT_TIMEOUT_S
from nbdmirror.qmp.command import ask_loop
from nbdmirror.server.server import Server
from nbdmirror.threads import NO_THREAD, start_thread_now

Result = TypeVar("Result")


def open_timeout_s(parameter: str, given: int) -> float:
    """The time for a connection and its handshake; `given` 0: the default. Raises CommandError."""
    if given > TARGET_TIMEOUT_S_MAX:
        raise CommandError(f"Parameter '{parameter}' expects at most {TARGET_TIMEOUT_S_MAX}")
    return given or CONNECT_TIMEOUT_S


async def open_device(uri: Callable[[], str], timeout_s: float) -> NbdDevice:
    """Connect on a new thread, within `timeout_s`. Raises CommandError."""

    def work() -> NbdDevice:
        return NbdDevice.open(uri(), timeout_s=timeout_s, mirrors=True)

    return await in_thread(work, unwanted=NbdDevice.close)


async def check_uri(server: Server, uri: str, disk: str) -> None:
    """`Nodes.check_uri`. The socket's file system may not answer: so a thread queries the file, and
    not the event loop. Raises CommandError."""
    file = await in_thread(partial(socket_file, uri))
    await ask_loop(server, partial(server.nodes.check_uri, uri, file, disk))


async def in_thread(
    call: Callable[[], Result], *, unwanted: Callable[[Result], None] = lambda result: None
) -> Result:
    """Do `call` on a new thread: so a server that does not answer delays no other client, and
    neither does a file system with keys, which `call` may read. asyncio's pool has six threads, and
    the process waits for them at its end, so it is not used. A result for which nobody waits any
    more is `unwanted`. Raises CommandError."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def report(found: list[Result], error: Exception | None) -> None:
        if found and not done.cancelled():
            done.set_result(found[0])
        elif found:
            unwanted(found[0])
        elif error is not None and not done.cancelled():
            done.set_exception(error)

    def work() -> None:
        found: list[Result] = []
        failure = None
        try:
            found.append(call())
        except Exception as error:  # noqa: BLE001 - the command's, which is waiting for it
            failure = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(report, found, failure)

    try:
        start_thread_now(work, "nbdmirror-open")
    except RuntimeError as error:
        raise CommandError(f"{NO_THREAD}; try later") from error
    try:
        return await done
    except ConfigError as error:
        raise CommandError(str(error)) from error
