"""What the comparisons of error policies with qemu-storage-daemon have in common."""

from __future__ import annotations

from typing import Any

import pytest
from support.paritysides import Setting
from support.paritysteps import Script, dismiss, do, heal, images, in_sync, query, status, swapped

POLICIES = [
    ("report", "EIO"),
    ("ignore", "EIO"),
    ("stop", "EIO"),
    ("stop", "ENOSPC"),
    ("enospc", "EIO"),
    ("enospc", "ENOSPC"),
    ("auto", "EIO"),
    ("auto", "ENOSPC"),
]
OPERATIONS = {"source": "read", "target": "write"}

SOME_POLICIES = [("report", "EIO"), ("ignore", "EIO"), ("stop", "EIO"), ("auto", "ENOSPC")]
by_policy = pytest.mark.parametrize(("policy", "errno_name"), POLICIES)
by_side = pytest.mark.parametrize("side", OPERATIONS)

RESUME = do("block-job-resume", device="j")
COMPLETE = do("block-job-complete", device="j")
SOFT_CANCEL = do("block-job-cancel", device="j")
FORCE_CANCEL = do("block-job-cancel", device="j", force=True)
ENDINGS = {"complete": COMPLETE, "soft cancel": SOFT_CANCEL}
IN_SYNC = in_sync()


def action_of(policy: str, errno_name: str) -> str:
    """What QEMU does; `auto` is `enospc`, on either side."""
    if policy in ("enospc", "auto"):
        return "stop" if errno_name == "ENOSPC" else "report"
    return policy


def faulty(side: str, **more: Any) -> Setting:
    options: dict[str, Any] = {side: "faulty", **more}
    return Setting(**options)


def failed(side: str, operation: str) -> Script:
    """After `report`: concluded with the error, and the source is served."""
    after = [heal(side, operation), images(target=False)]
    return [status("concluded"), query(), dismiss(), after]


def completed() -> Script:
    return [COMPLETE, status("concluded"), query(), images(), swapped(), dismiss()]
