"""A command that changes saved state is answered when the change is on disk.

On the QMP server's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from nbdmirror.errors import CommandError
from nbdmirror.qmp.command import ask_loop
from nbdmirror.server.server import Server
from nbdmirror.state.null_store import StateStore

SAVED_S_MAX = 5.0
"""Bound of the wait. If a target hangs with a guest's write, a client must get its answer, to be
able to cancel the job."""


async def mirrors_saved(server: Server) -> None:
    """Wait until the mirrors are on disk. A mirror continues if they cannot be saved, and an event
    reports that."""
    with suppress(OSError):
        await _saved(server, lambda store: store.saved())


async def bitmaps_saved(server: Server) -> None:
    """Wait until the persistent bitmaps are on disk. Raises CommandError if they cannot be saved,
    since they are promised to be on disk."""
    try:
        await all_saved(server)
    except OSError as error:
        raise CommandError(f"The change is active but could not be saved: {error}") from error


async def all_saved(server: Server) -> None:
    """Wait until everything is on disk. Raises OSError."""
    await _saved(server, lambda store: store.bits_saved())


async def _saved(server: Server, save: Callable[[StateStore], Future[None]]) -> None:
    def saves() -> list[Future[None]]:
        return [save(store) for store in server.stores.values() if store.is_lasting]

    futures: list[Future[None]] = await ask_loop(server, saves)
    deadline_s = time.monotonic() + SAVED_S_MAX
    for future in futures:
        await _ended(server, asyncio.wrap_future(future), deadline_s)


async def _ended(server: Server, save: asyncio.Future[None], deadline_s: float) -> None:
    """Wait for the save. Raises OSError if it failed, or has not ended by `deadline_s`."""
    save.add_done_callback(
        lambda future: future.cancelled() or future.exception()
    )  # retrieves the exception
    await asyncio.wait([save], timeout=max(0.0, deadline_s - time.monotonic()))
    if not save.done():
        raise TimeoutError(server.state_problem or "guests' writes in flight do not end")
    try:
        save.result()
    except OSError as error:
        raise OSError(f"the state directory cannot be written: {error}") from error
