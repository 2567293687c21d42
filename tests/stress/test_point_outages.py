"""Points to a far side that is away for NBDMIRROR_OUTAGE_S seconds (20 unless told otherwise),
while a guest writes all the time: the server's memory does not grow, the guest notices nothing, and
the next point comes as soon as it can."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from integration.mirror.points.pointsparts import FarSide
from stress.outage import Outage
from support.fixtures import Identical, Start
from support.images import MiB, assert_identical, make_image, make_noise
from support.servers import Nbdmirror

pytestmark = pytest.mark.stress

SIZE = 128 * MiB
RING_BYTES = 256 * MiB
SLOWER_MAX = 1.1
GROWTH_BYTES_MAX = 8 * MiB
"""Of the server's memory, while the far side is away."""
STORE_BYTES = 64 * MiB
IN_FLIGHT_BYTES = 16 * MiB


@pytest.mark.parametrize("kind", ["stopped", "killed", "journal stopped"])
def test_a_far_side_that_is_away(
    start: Start, folder: Path, identical: Identical, kind: str
) -> None:
    disk = make_noise(folder / "disk.img", SIZE)
    far = FarSide(start, folder, ring=RING_BYTES, size=SIZE)
    server = start(Nbdmirror(folder, disk, bare=True))
    neighbour = start(Nbdmirror(folder, make_image(folder / "other.img", SIZE), bare=True))
    options = {"x_nbdmirror_interval": 1, "x_nbdmirror_reconnect_delay": 86400}
    far.start_mirror(server, **options)
    server.qmp.wait_ready()
    outage = Outage(server, far, neighbour)
    outage.go_through(kind)
    figures = outage.figures
    for line in figures.lines():
        sys.stdout.write(f"{kind}: {line}\n")
    assert_identical(disk, outage.recovered())
    server.qmp.execute("block-job-cancel", device="j")
    server.qmp.wait_completed()
    identical(disk, far.image_server.uri())

    before, during, after = (figures.resident_bytes[when] for when in ("before", "during", "after"))
    assert max(during) <= max(before) + GROWTH_BYTES_MAX
    assert max(after) <= max(before) + STORE_BYTES + IN_FLIGHT_BYTES + GROWTH_BYTES_MAX
    slower_max = max(SLOWER_MAX, figures.unrest)
    assert figures.p999_s["during"] <= slower_max * figures.p999_s["before"]
    assert figures.whole_point_s <= figures.point_s_max
