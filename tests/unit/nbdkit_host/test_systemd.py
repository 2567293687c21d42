"""The line that `systemctl status` shows, from the events."""

from __future__ import annotations

from nbdmirror.events import EventRing
from nbdmirror.nbdkit_host.systemd import Status


def test_a_disk_that_was_pivoted_again_and_again() -> None:
    """To and fro between servers, for years."""
    events = EventRing(lambda: 0.0)
    status = Status(["vda", "vdb"], events)
    status.start()
    for _ in range(3):
        events.append("JOB_STATUS_CHANGE", {"id": "j", "status": "ready"})
        assert "job j: ready" in status.text
        events.append("X_NBDMIRROR_PIVOTED", {"device": "vda", "id": "j", "pause-ms": 1.0})
        events.append("JOB_STATUS_CHANGE", {"id": "j", "status": "null"})
    assert status.text == "serving vda, vdb; vda: served from its mirror's target"
