"""What the tests of modes and endings have in common: bitmaps of a disk, and a mirror that is in
sync."""

from __future__ import annotations

from typing import Any

from support.images import MiB
from support.qmpclient import Qmp
from support.waiting import wait_until

SIZE = MiB


def add_bitmap(qmp: Qmp, name: str = "b", **options: Any) -> None:
    qmp.execute("block-dirty-bitmap-add", node="src", name=name, **options)


def marks(qmp: Qmp, name: str = "b", node: str = "src") -> dict[str, Any]:
    """The bitmap as query-named-block-nodes has it."""
    nodes = qmp.execute("query-named-block-nodes")
    (info,) = [info for info in nodes if info["node-name"] == node]
    (found,) = [bitmap for bitmap in info["dirty-bitmaps"] if bitmap.get("name") == name]
    return dict(found)


def wait_in_sync(qmp: Qmp) -> None:
    def is_so() -> bool:
        jobs = qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
        return not any(job["dirty-bytes"] + job["in-flight-bytes"] for job in jobs)

    wait_until(is_so, "all is in sync")


def soft_cancel(qmp: Qmp) -> None:
    qmp.execute("block-job-cancel", device="j")
    qmp.wait_completed()
