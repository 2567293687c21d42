"""What a server tells of how long guests' requests took, and of what a mirror had them wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.fixtures import Identical, Start
from support.guests import Guest
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.disk.latency import BUCKETS


def by(name: str, found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one[name]: one for one in found}


def job_of(server: Nbdmirror) -> dict[str, Any]:
    return dict(server.qmp.disk()["jobs"][0])


def requests(server: Nbdmirror) -> dict[str, dict[str, Any]]:
    return by("kind", server.qmp.disk()["requests"])


def test_requests_and_waits(
    start: Start, identical: Identical, disk: Path, target: QemuNbd
) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    assert server.qmp.disk()["requests"] == server.qmp.disk()["held"] == []
    with Guest(server.uri(), disk, connections=4) as guest:
        every = {"read", "write", "zero", "trim", "flush"}
        wait_until(lambda: set(requests(server)) == every, "one of each kind is timed")
    before = requests(server)  # none is under way: each is counted in several steps
    assert server.qmp.disk()["held"] == [], "there was no mirror"
    for one in before.values():
        assert one["buckets"] == one["own-buckets"] and one["seconds"] == one["own-seconds"] > 0
    with Guest(server.uri(), guest.model, seed=2, connections=4) as later:
        identical(later, target.image)
        server.qmp.start_mirror(target.uri(), copy_mode="write-blocking")
        server.qmp.wait_ready()

        def is_share_seen() -> bool:
            write = requests(server)["write"]
            return bool(write["own-seconds"] < write["seconds"])

        wait_until(is_share_seen, "a write that waits for the target is timed")
        wait_until(lambda: job_of(server).get("guests-wait-share"), "enough requests are timed")
        job = job_of(server)
        assert 0 < job["guests-wait-share"] < 1
        assert "of their time waiting for the mirror" in job["explanation"][-1]
        server.qmp.complete()
        later.wait_for_requests(20)
    found = server.qmp.disk()
    after, held = by("kind", found["requests"]), by("cause", found["held"])
    assert held["target"]["seconds"] > 0 and set(held) <= {"target", "pivot"}
    for kind, one in after.items():
        assert sum(one["buckets"]) == sum(one["own-buckets"]) >= sum(before[kind]["buckets"])
        assert 0 < len(one["buckets"]) <= BUCKETS and one["buckets"][-1]
    assert after["read"]["own-seconds"] == after["read"]["seconds"], "a read waits for no mirror"
