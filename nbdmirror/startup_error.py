"""How a server in the background reports the result of its start to the command that started it:
over a pipe, since its standard streams are closed by then."""

from __future__ import annotations

import os
from contextlib import suppress

READY_FD = "NBDMIRROR_READY_FD"
"""The environment variable with the pipe's descriptor number."""

READY = "ready"
"""The text on the pipe when the server serves; otherwise the text is the error."""


def tell(text: str) -> None:
    """Report READY, or why the server does not start. Once; has no effect without such a
    command."""
    fd = os.environ.pop(READY_FD, "")
    if fd:
        with suppress(OSError):  # the command has ended meanwhile
            os.write(int(fd), text.encode())
            os.close(int(fd))
