"""A process that shows servers which are made up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.madeservers import JOB, Made, Serving, disk, status
from support.waiting import wait_until

from nbdmirror.web import host as web_host
from nbdmirror.web.host import NoAnswer


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """Two servers, one of which cannot be asked."""
    monkeypatch.setattr(web_host, "INTERVAL_S", 0.1)
    monkeypatch.setattr(web_host, "INTERVAL_S_MIN", 0.05)
    servers = {"/a": Made(status(disk("vda", JOB))), "/b": Made(NoAnswer("no server at /b"))}
    with Serving(servers) as one:
        wait_until(lambda: one.json("/healthz")["servers"] == 2, "both were asked")
        yield one
