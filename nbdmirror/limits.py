"""Bounds of the numbers that users set, for the command line and the plugin alike. This module
imports nothing, so that the command line starts quickly."""

from __future__ import annotations

PORT_MAX = 65535

THREADS_MAX = 256
"""Of one connection. More than a few dozen have never been faster."""

CONNECTIONS_MAX = 64
"""To one NBD server: more than a guest has threads."""

KEEPALIVE_S_MAX = 32767
"""The kernel's longest idle time and interval."""

OPEN_TIMEOUT_S_MAX = 86400

RECONNECT_DELAY_S_MAX = 2**32 - 1
"""QEMU's type of the same option is uint32."""
