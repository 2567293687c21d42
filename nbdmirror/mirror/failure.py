"""What went wrong with a job, as an error policy, a user or QEMU's tools see it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nbdmirror.errors import CommandError, errno_of


@dataclass(frozen=True, slots=True)
class JobError:
    """The content of the last BLOCK_JOB_ERROR, and the reason as text."""

    operation: str
    action: str
    reason: str


class Cancelled(Exception):
    """The reason of a job that was cancelled by force."""


def error_text(error: BaseException) -> str:
    """As QEMU: the text of strerror only, unless the error is a CommandError."""
    return str(error) if isinstance(error, CommandError) else os.strerror(errno_of(error))
