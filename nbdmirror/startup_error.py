"""How a server in the background tells the command that started it how its start went: over a pipe,
since its standard streams are closed by then.
"""

from __future__ import annotations

import os
from contextlib import suppress

READY_FD = "NBDMIRROR_READY_FD"
"""The environment's name of the pipe's number."""

READY = "ready"
"""What the pipe says of a server that serves; of another one, the reason."""


def tell(text: str) -> None:
    """READY, or why the server does not start. Once; without such a command nobody is told."""
    fd = os.environ.pop(READY_FD, "")
    if fd:
        with suppress(OSError):  # the command was ended meanwhile
            os.write(int(fd), text.encode())
            os.close(int(fd))
