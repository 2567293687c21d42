"""Bounds of the numbers that users set, for the command line and the plugin. This module imports
nothing, so that the command line starts quickly."""

from __future__ import annotations

PORT_MAX = 65535

THREADS_MAX = 256
"""Most threads of one connection. More than a few dozen have never been faster."""

CONNECTIONS_MAX = 64
"""Most connections to one NBD server: more than a guest has threads."""

KEEPALIVE_S_MAX = 32767
"""The kernel's longest idle time and interval."""

OPEN_TIMEOUT_S_MAX = 86400

TARGET_TIMEOUT_S_MAX = 3600
"""Longest time for a target's server to answer. A command that waits for that counts as a client
(server.CLIENTS_MAX), even if its client has disconnected. So there are never more handshakes than
clients are allowed."""

RECONNECT_DELAY_S_MAX = 2**32 - 1
"""QEMU's type of the same option is uint32."""

MAX_PAUSE_MS_MAX = 10_000
"""Longest pause of a pivot that a user can allow. Guests' own timeouts begin at about 30 s."""

DEADLINE_S_MAX = 366 * 86400
"""Longest time until a deadline. A number of more seconds is a time of day by mistake."""

_DIGITS_MAX = 18


def whole_number(text: str, least: int, most: int) -> int | None:
    """The whole number in `text`, from `least` to `most`; otherwise None. Python's int() also
    accepts signs, spaces, underscores and digits of other scripts, and fails with thousands of
    digits."""
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX):
        return None
    number = int(text)
    return number if least <= number <= most else None
