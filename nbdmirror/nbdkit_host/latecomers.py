"""Disks on NBD servers that start later than this server: after a power cut a site starts in any
order.

Before nbdkit forks, and before any guest is served.
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
"""Time that each attempt asks systemd for, beyond its start timeout and the time of the attempt."""

HANDSHAKE_S_MAX = 60
"""Longest time of one attempt, now and at each reconnect: less than systemd's start timeout, so
that a server that accepts and does not answer is tried more than once."""


def handshake_s(timeout_s: int) -> int:
    """The time of one attempt, if attempts are repeated for `timeout_s`."""
    return max(int(CONNECT_TIMEOUT_S), min(timeout_s, HANDSHAKE_S_MAX))


class Opening:
    """Opens all disks of a server, within one time limit."""

    def __init__(self, timeout_s: int) -> None:
        """QEMU's `open-timeout`: attempts are repeated for `timeout_s` seconds; 0: one attempt."""
        self._handshake_s = handshake_s(timeout_s)
        self._deadline_s = time.monotonic() + timeout_s

    def open(self, uri: str) -> NbdDevice:
        """Connect to a disk's server. Raises ConfigError."""
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
