"""What the tests of a state directory have in common: a mirror on its way, and how its server ends.

A power cut is a killed process whose memory is taken away (`lose_memory`): the bitmaps that were
last saved and the log of intents are what is left. That every byte of the files may be lost in a
crash is tests/model/test_powerloss.py's affair.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.images import KiB, MiB
from support.kept import Kept, power_cut
from support.qmpclient import Qmp
from support.servers import QemuNbd
from support.waiting import wait_until

SIZE = 32 * MiB
GRANULE = 64 * KiB
TOLD = r"ERROR: (state|disk|job)|refused|put aside|counts as dirty|lost"
"""What a server says of a state that it cannot use."""


def begin(server: Kept, target: QemuNbd, **options: object) -> Qmp:
    qmp = server.qmp
    qmp.add_target("t", target)
    qmp.start_mirror("t", device="vda", granularity=GRANULE, **options)
    return qmp


def settle(server: Kept, node: str = "vda") -> None:
    """Have what is dirty saved twice: the second time takes regions that were written to before the
    first one out of the log. A command about a persistent bitmap is answered when that is done.
    `node`: which the disk is served from."""
    for _ in range(2):
        server.qmp.execute("block-dirty-bitmap-add", node=node, name="x", persistent=True)
        server.qmp.execute("block-dirty-bitmap-remove", node=node, name="x")


def restart_until_ready(server: Kept) -> Qmp:
    """So little may be left that the event comes before somebody hears it."""
    qmp = server.restart()
    wait_until(lambda: qmp.job()["ready"], "the mirror went on")
    return qmp


def finish(server: Kept, job: str = "j") -> int:
    """Complete the mirror; returns how many bytes it has copied since its server began."""
    qmp = server.qmp
    wait_until(lambda: qmp.job(job)["ready"], "the mirror is ready")
    return int(qmp.complete(job)["offset"])


END: dict[str, Callable[[Kept], None]] = {
    "orderly end": Kept.stop,
    "killed": Kept.kill,
    "power cut": power_cut,
}
ends = pytest.mark.parametrize("end", END.values(), ids=END.keys())
End = Callable[[Kept], None]
