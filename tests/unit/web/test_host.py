"""How servers are asked: each by itself, and no more often than is needed."""

from __future__ import annotations

import time

import pytest
from support.madeservers import JOB, Made, Serving, disk, status
from support.waiting import wait_until

from nbdmirror.web import host as web_host


def test_maps_are_asked_for_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few at a time, however many jobs there are, and never of a job that has ended."""
    monkeypatch.setattr(web_host, "INTERVAL_S", 0.1)
    monkeypatch.setattr(web_host, "INTERVAL_S_MIN", 0.05)
    jobs = [JOB | {"device": f"j{number}"} for number in range(10)]
    server = Made(status(disk("vda", *jobs, JOB | {"device": "over", "status": "concluded"})))
    cells = {"lengths": [1], "dirty": [1], "in-flight": [0], "unflushed": [0], "zero": [0]}
    server.maps = {f"j{number}": cells for number in range(10)}
    with Serving({"/a": server}) as one:
        wait_until(lambda: len(server.asked_maps) >= 20, "each was asked for twice")
        asked, count = server.asked_maps[:20], len(server.asked_maps)
        assert sorted(asked) == sorted(2 * [f"j{number}" for number in range(10)])
        assert count <= web_host.MAPS_MAX * (server.asked + 1)
        text = "Map of the disk of job j{}, 1 B: 0 B in flight, 1 B dirty"
        page = one.get("/")[1]
        assert all(text.format(number) in page for number in range(10)), "all are kept"
        server.says = status(disk("vda", jobs[0]))
        wait_until(lambda: "job j1," not in one.get("/")[1], "those of jobs that are gone are not")
        assert text.format(0) in one.get("/")[1]


@pytest.mark.slow
def test_a_server_is_not_asked_more_often_for_more_clients(serving: Serving) -> None:
    server = serving.servers["/a"]
    before, began_s = server.asked, time.monotonic()
    for _ in range(300):
        assert serving.get("/metrics")[0] == 200
    asked, took_s = server.asked - before, time.monotonic() - began_s  # in this order
    assert asked <= 2 + took_s / web_host.INTERVAL_S_MIN


def test_one_that_does_not_answer_holds_up_no_other(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = Made(status())
    silent.is_silent = True
    serving.servers["/c"] = silent
    wait_until(lambda: "1 server is being asked" in serving.get("/")[1], "it is asked")
    del serving.servers["/c"]
    wait_until(lambda: "being asked" not in serving.get("/")[1], "it is gone")
    monkeypatch.setattr(web_host, "ANSWER_S_MAX", 1.0)
    serving.servers["/c"] = silent
    wait_until(lambda: "/c" in serving.json("/healthz")["not-answering"], "it was given up")
    assert "being asked" not in serving.get("/")[1]
    before = serving.servers["/a"].asked
    wait_until(lambda: serving.servers["/a"].asked > before + 3, "the other is asked on")
    assert serving.json("/healthz")["not-answering"]["/c"] == "no answer within 1 s"
    silent.is_silent = False
    wait_until(lambda: "/c" not in serving.json("/healthz")["not-answering"], "it is back")


def test_servers_come_and_go(serving: Serving) -> None:
    serving.servers["/c"] = Made(status(disk("new")))
    wait_until(lambda: "new" in serving.get("/status")[1], "it appears")
    del serving.servers["/a"], serving.servers["/c"]
    wait_until(lambda: len(serving.json("/status")) == 1, "they disappear")
    assert "/a" not in serving.get("/metrics")[1]


def test_an_event_has_the_server_asked(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_host, "INTERVAL_S", 3600.0)
    server = serving.servers["/a"]
    wait_until(lambda: not server.unread, "what is under way has ended")
    server.says = status(disk("changed"))
    server.unread.append("JOB_STATUS_CHANGE status=ready")
    wait_until(lambda: "changed" in serving.get("/status")[1], "the news is there")


def test_a_point_made_in_time_is_no_reason_to_ask(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each lag that is shown would be the one right after a point, the smallest."""
    monkeypatch.setattr(web_host, "INTERVAL_S", 3600.0)
    server, point = serving.servers["/a"], "X_NBDMIRROR_POINT sequence=1"
    server.unread.append("BEGIN")
    wait_until(lambda: "BEGIN" in serving.get("/")[1], "what was under way has ended")
    wait_until(lambda: server.is_listened_to, "it was asked")
    before = server.asked
    server.routine = {point}
    server.unread.append(point)
    wait_until(lambda: not server.unread, "it was heard")
    server.unread.append("X_NBDMIRROR_RPO kept=false")
    wait_until(lambda: server.asked > before, "that is news")
    assert server.asked == before + 1
    text = serving.get("/")[1]
    assert "X_NBDMIRROR_RPO" in text and "X_NBDMIRROR_POINT" not in text


def test_too_many_servers_are_said(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_host, "SERVERS_MAX", 1)
    wait_until(lambda: serving.json("/healthz").get("left-out") == 1, "one is left out")
    assert [one["qmp"] for one in serving.json("/status")] == ["/a"]
