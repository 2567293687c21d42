"""The options of a mirror job: QEMU's blockdev-mirror arguments, and its error policies."""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass

BUFFER_BYTES_DEFAULT = 64 << 20
"""Default of buf-size. QEMU's is 16 MiB, which over a link of 20 ms is 800 MB/s. A near target gets
at most in_flight.QUICK_BYTES, so the rest is never allocated for such a target."""


class Policy(enum.StrEnum):
    """QEMU's BlockdevOnError. `auto` means `enospc`, as in qemu-storage-daemon."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"

    def action(self, error_number: int) -> Policy:
        """The action for an error with this errno: REPORT, IGNORE or STOP."""
        if self in (Policy.ENOSPC, Policy.AUTO):
            return Policy.STOP if error_number == errno.ENOSPC else Policy.REPORT
        return self


class CopyMode(enum.StrEnum):
    """QEMU's MirrorCopyMode, and POINTS."""

    BACKGROUND = "background"
    WRITE_BLOCKING = "write-blocking"
    POINTS = "points"
    """The far side gets the disk as it was at one moment, and then at another."""


class OnDeadline(enum.StrEnum):
    """What happens to a mirror that has not ended at its deadline."""

    REPORT = "report"
    CANCEL = "cancel"
    COMPLETE = "complete"


class Ending(enum.Enum):
    """The ending that was requested after READY."""

    NONE = "none"
    COMPLETE = "complete"  # swap to the target
    CANCEL = "cancel"  # keep the source, leave the target consistent


@dataclass(frozen=True, slots=True)
class MirrorOptions:
    """QEMU's blockdev-mirror arguments; sizes in bytes, speed in bytes per second (0: no limit)."""

    job_id: str
    sync: str = "full"
    copy_mode: CopyMode = CopyMode.BACKGROUND
    granularity: int = 0
    buffer_bytes: int = BUFFER_BYTES_DEFAULT
    speed_bytes_per_s: int = 0
    on_source_error: Policy = Policy.REPORT
    on_target_error: Policy = Policy.REPORT
    unmap: bool = True
    reconnect_delay_s: float = 0.0
    target_is_zero: bool = False
    clear_bitmap: bool = True
    """bitmap-mode on-success: the bitmap is cleared when the job completes."""
    cluster_bytes: int = 0
    """The target's cluster size, if the user gave it; else 0."""
    allow_larger: bool = False
    """The target may be larger than the disk (rule 43)."""
    auto_finalize: bool = True
    auto_dismiss: bool = True
    max_pause_s: float | None = None
    """How long a pivot may hold guests' writes; None: until quiesce.LIMIT_S, expected or not."""
    may: tuple[str, ...] = ()
    """What may be done to bring the mirror to its end (ladder.Rung)."""
    deadline_at_s: float | None = None
    """Until when the mirror is to have ended, in seconds since 1970; None: no deadline."""
    on_deadline: OnDeadline = OnDeadline.REPORT

    @property
    def writes_all(self) -> bool:
        """The mirror overwrites all of the target's old content."""
        return self.sync == "full" and not self.target_is_zero

    def policy(self, operation: str) -> Policy:
        """The policy for errors of `operation`: "read" for the source, "write" for the target."""
        return self.on_source_error if operation == "read" else self.on_target_error
