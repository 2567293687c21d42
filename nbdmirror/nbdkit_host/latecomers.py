"""Disks on NBD servers that start later than we do: after a power cut a site comes up in any order.

Before nbdkit forks, and before anybody is served.
"""

from __future__ import annotations

import logging
import time

from nbdmirror import logs
from nbdmirror.errors import Unreachable
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.nbdclient.pool import CONNECT_TIMEOUT_S
from nbdmirror.nbdkit_host import systemd

RETRY_S = 1.0

SUPERVISOR_S = 60
"""What systemd is asked for with each attempt, beyond what it allows for a start and what an
attempt takes."""

HANDSHAKE_S_MAX = 60
"""Of one attempt, now and whenever the disk is connected to again: less than systemd allows for a
start, so that a server that accepts and says nothing is tried more than once."""


class Opening:
    """Of all disks of a server, within one limit."""

    def __init__(self, timeout_s: int) -> None:
        """QEMU's `open-timeout`: attempts are repeated until so many seconds have gone. 0: one."""
        self._handshake_s = max(CONNECT_TIMEOUT_S, min(timeout_s, HANDSHAKE_S_MAX))
        self._deadline_s = time.monotonic() + timeout_s

    def open(self, uri: str) -> NbdDevice:
        """Raises ConfigError."""
        is_told = False
        while True:
            try:
                device = NbdDevice.open(uri, timeout_s=self._handshake_s)
            except Unreachable as error:
                left_s = self._deadline_s - time.monotonic()
                if left_s <= 0:
                    raise
                if not is_told:
                    text = f"{error}; trying again for {left_s:.0f} s (open-timeout)"
                    logs.print_startup_error(text, logging.WARNING)
                    is_told = True
                extend_s = SUPERVISOR_S + self._handshake_s
                extend = f"EXTEND_TIMEOUT_USEC={extend_s * 1_000_000:.0f}"
                systemd.notify(f"STATUS=waiting for {uri}", extend)
                time.sleep(min(RETRY_S, left_s))
                continue
            if is_told:
                logs.print_startup_error(f"connected to {uri}", logging.INFO)
            return device
