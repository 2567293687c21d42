"""Connects to NBD servers for commands, on helper threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from nbdmirror.errors import CommandError, ConfigError
from nbdmirror.nbdclient.device import NbdDevice


async def open_device(uri: Callable[[], str], timeout_s: float) -> NbdDevice:
    """Connect on a new thread, within `timeout_s`: so a server that does not answer delays no other
    client, and neither does a file system with keys, which `uri` may read. asyncio's pool has six
    threads, and the process waits for them at its end, so it is not used. Raises CommandError."""
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[NbdDevice] = loop.create_future()

    def report(device: NbdDevice | None, error: Exception | None) -> None:
        if device is not None and not opened.cancelled():
            opened.set_result(device)
        elif device is not None:
            device.close()
        elif error is not None and not opened.cancelled():
            opened.set_exception(error)

    def work() -> None:
        device, failure = None, None
        try:
            device = NbdDevice.open(uri(), timeout_s=timeout_s, mirrors=True)
        except Exception as error:  # noqa: BLE001 - the command's, which is waiting for it
            failure = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(report, device, failure)

    threading.Thread(target=work, name="nbdmirror-open", daemon=True).start()
    try:
        return await opened
    except ConfigError as error:
        raise CommandError(str(error)) from error
