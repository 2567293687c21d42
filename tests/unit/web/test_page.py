"""The page as HTML: text of servers stays text, and who cannot see it can read it."""

from __future__ import annotations

import itertools
import re
import time
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import strategies as st
from support.in_parts import given_in_parts
from support.madeservers import JOB, POINTS, any_status, disk, status

from nbdmirror.web import history as web_history
from nbdmirror.web import page as web_page
from nbdmirror.web import picture as web_picture
from nbdmirror.web.history import NOTES_MAX, SPAN_S, History
from nbdmirror.web.page import events_html, page, servers_html
from nbdmirror.web.plot import HEIGHT, WIDTH, plot
from nbdmirror.web.records import Report, plain

VOID = {"meta", "link", "input", "br", "img", "polyline"}
EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;{{7*7}}\r\nevent: x"
LAST = {"id": "vda", "target": "nbd://b", "result": "failed", "ended-at-s": 1.7e9, "reason": "gone"}


class Parsed(HTMLParser):
    """`elements`: each with its attributes and the text in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert not self._open, "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        found = [(attributes, texts) for name, attributes, texts in self.elements if name == tag]
        return [(attributes, " ".join(" ".join(texts).split())) for attributes, texts in found]

    @property
    def text(self) -> str:
        return self.all("body")[0][1]


def whole(*reports: Report, samples: int = 3) -> Parsed:
    history = History(lambda: 1.7e9)
    for report in reports:
        for age in range(samples, 0, -1):
            history.add(Report(report.socket, report.time_s - 2.0 * age, report.status))
        history.note(report.socket, "JOB_STATUS_CHANGE status=ready id=vda")
    return Parsed(page("host1", servers_html(list(reports), history), history, 9))


def report(*disks: dict[str, Any], socket: str = "/run/a.qmp", **more: Any) -> Report:
    return Report(socket, 1.7e9, status(*disks, **more))


def test_what_it_shows() -> None:
    text = whole(
        report(disk("vda", JOB), disk("vdb", last_job=LAST), disk("vdc", read_only=True)),
        Report("/run/b.qmp", 1.7e9, error="no answer within 5 s"),
    ).text
    moment = time.strftime("%H:%M:%S", time.localtime(1.7e9))
    for part in (
        "/run/a.qmp", "nbdmirror 0.1.0", f"status of {moment}", "vda 1 GiB, read-write",
        "/srv/vda.img", "Job vda: ready", "nbd://backup/vda", "The target is behind by 0.3 s",
        "Left to copy 192 KiB", "Dirty 64 KiB", "In flight 128 KiB", "Copied 5 MiB/s",
        "Changed by guests 4 MiB/s", "12 MiB for 10 MiB (1.20)", "Copy mode background",
        "has nothing to do (70 % of the last minute); the target follows the source",
        "Time since the start nothing to do 70 %, target write 20 %, source read 10 %",
        "Last job vda: failed", "gone", "vdc 1 GiB, read-only", "No job",
        "/run/b.qmp no answer within 5 s", "JOB_STATUS_CHANGE status=ready id=vda",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        ({"target-connected": False, "target-lost-for-s": 12}, "the target has been lost for 0:12"),
        ({"io-status": "nospace"}, "I/O error (nospace)"),
        (
            {"falling-behind": True, "dirty-bytes-per-s": 8 << 20},
            "falls behind: the guest changes 8 MiB/s",
        ),
        ({"target-silent-for-s": 30}, "the target has not answered for 0:30"),
    ],
)
def test_trouble_is_shown_as_status_shows_it(trouble: dict[str, Any], text: str) -> None:
    assert text in whole(report(disk("vda", JOB | trouble))).text


@pytest.mark.parametrize("lost", ["target-connected", "journal-connected"])
def test_a_far_side_that_is_lost_is_not_shown_as_well(lost: str) -> None:
    def moods(job: dict[str, Any]) -> list[str | None]:
        spans = whole(report(disk("vda", job))).all("span")
        return [found["class"] for found, _ in spans if "state" in str(found.get("class"))]

    assert moods(JOB | POINTS) == ["state good"]
    assert moods(JOB | POINTS | {lost: False}) == ["state bad"]


def test_what_is_asked_for_is_no_trouble() -> None:
    deadline = {"outlook": "can-be-kept", "on-deadline": "report", "left-s": 90.0, "at-s": 1e9}
    seen = whole(report(disk("vda", JOB | {"x-nbdmirror-deadline": deadline})))
    assert "its deadline in 1:30 can be kept" in seen.text
    assert not [one for one in seen.all("p") if one[0].get("class") == "trouble"]


def test_points_and_what_guests_pay() -> None:
    lines = whole(report(disk("vda", JOB | POINTS | {"guests-wait-share": 0.03}))).text
    moment = time.strftime("%H:%M:%S", time.localtime(1_699_999_999))
    for part in (
        f"Last point 812, of {moment}", "Points to recover 60, back to 1:00 ago",
        "Journal 1 MiB of 1 GiB used", "An outage may last 15:00",
        "Promised to be behind by 10.0 s at most", "3.0 % of their time waiting for the mirror",
    ):  # fmt: skip
        assert part in lines, part


@pytest.mark.parametrize(
    ("unanswered", "text"),
    [
        (0, "No server was found on this host."),
        (1, "1 server is being"),
        (2, "2 servers are being"),
    ],
)
def test_before_the_first_answer(unanswered: int, text: str) -> None:
    """A server that hangs is given five seconds: meanwhile it is not said that there is none."""
    shown = servers_html([], History(lambda: 1.7e9), unanswered)
    assert text in shown and ("No server" in shown) is (not unanswered)


def test_a_plot_of_nothing_is_not_drawn() -> None:
    nothing = {"copy-bytes-per-s": None, "dirty-bytes-per-s": None}
    text = whole(report(disk("vda", JOB | nothing))).text
    assert "copied: -" not in text and "behind: 0.3 s" in text


@pytest.mark.parametrize(
    ("lag_s", "text"), [(0.0, "0.0 s"), (0.001, "0.1 s"), (0.9, "0.9 s"), (89.2, "1:30")]
)
def test_a_lag_is_never_shown_too_small(lag_s: float, text: str) -> None:
    shown = whole(report(disk("vda", JOB | {"lag-s": lag_s}))).text
    assert f"The target is behind by {text} " in shown
    assert f"behind: {text}" in shown


def shown_map(**kinds: list[int]) -> dict[str, list[int]]:
    """Of four cells."""
    nothing = [0] * 4
    lengths = {"lengths": [100] * 4, "dirty": nothing, "unflushed": nothing, "zero": nothing}
    return {**lengths, "in-flight": nothing, **kinds}


def test_a_map_of_the_disk() -> None:
    """Cells that look the same are one rectangle. The words have the same numbers."""
    one = report(disk("vda", JOB))
    one.maps["vda"] = shown_map(dirty=[0, 50, 50, 100], zero=[100, 0, 0, 0])
    found = whole(one, samples=0)
    ((attributes, _),) = found.all("svg")
    label = "400 B: 0 B in flight, 200 B dirty, 0 B not flushed, 100 B zeroes"
    assert attributes["aria-label"] == f"Map of the disk of job vda, {label}"
    assert attributes["role"] == "img"
    keys = ("class", "x", "width", "y", "height")
    bars = [tuple(bar.get(key) for key in keys) for bar, _ in found.all("rect")]
    assert bars == [
        ("zeroes", "0", "1", "11", "1"),
        ("dirty", "1", "2", "6", "6"),
        ("dirty", "3", "1", "0", "12"),
    ]
    assert label in found.text
    for kind in ("in flight", "dirty", "not flushed", "zeroes", "clean"):
        assert kind in [text for one, text in found.all("span") if "kind" in str(one)]


def test_every_kind_has_a_colour_and_a_look_of_its_own() -> None:
    style = (web_page.FOLDER / "page.css").read_text()
    for name, _ in web_picture.kinds():
        assert f".map .{name} {{ --kind:" in style
    assert len({*web_picture._HEIGHTS.values()}) == len(web_picture._HEIGHTS)


@pytest.mark.parametrize("answer", [{}, {"lengths": "x"}, shown_map(dirty=[1, 2]), {"lengths": []}])
def test_no_map_of_an_answer_that_is_none(answer: dict[str, Any]) -> None:
    one = report(disk("vda", JOB))
    one.maps["vda"] = answer
    assert not whole(one, samples=0).all("svg")


def test_what_is_not_known_is_not_drawn() -> None:
    """The lag of a job that was not ready yet; anything, of one that has just begun."""
    copying = {key: value for key, value in JOB.items() if key != "lag-s"} | {"ready": False}
    for job, samples, plots in ((JOB, 3, 2), (copying, 3, 1), (JOB, 0, 0)):
        assert len(whole(report(disk("vda", job)), samples=samples).all("svg")) == plots


def test_trouble_of_a_disk_and_a_server() -> None:
    found = whole(
        report(
            disk("a", connected=False), disk("b", problem="was truncated"), disk("c", target_only="nbd://x"),
            state_error="No space left on device",
        )
    )  # fmt: skip
    for part in ("server is lost", "was truncated", "is served from nbd://x", "No space left"):
        assert part in found.text


def test_text_of_servers_stays_text() -> None:
    """Wherever they have some."""
    job = JOB | dict.fromkeys(("device", "status", "target", "copy-mode", "io-status"), EVIL)
    job |= {"error": EVIL, "last-error": {"reason": EVIL, "action": "ignore", "operation": EVIL}}
    evil = disk(EVIL, job, source=EVIL, problem=EVIL, target_only=EVIL)
    ended = disk(EVIL, last_job=LAST | dict.fromkeys(("id", "reason", "target"), EVIL))
    history = History(lambda: 1.7e9)
    history.note(EVIL, EVIL)
    reports = [
        Report(EVIL, 1.7e9, status(evil, ended, package=EVIL, state_error=EVIL)),
        Report(EVIL, 1.7e9, error=EVIL),
    ]
    found = Parsed(page(EVIL, servers_html(reports, history), history, 9))
    assert [attributes for attributes, _ in found.all("script")] == [
        {"src": "page.js", "defer": None}
    ]
    assert found.all("img") == []
    assert not [a for _, attributes, _ in found.elements for a in attributes if a.startswith("on")]
    assert found.text.count("{{7*7}}") >= 14


def test_it_asks_no_other_address() -> None:
    found = whole(report(disk("vda", JOB)))
    links = [
        value
        for _, attributes, _ in found.elements
        for name, value in attributes.items()
        if name in ("src", "href", "action", "data", "poster", "srcset", "style")
    ]
    assert set(links) == {"data:,", "page.css", "page.js", "status", "metrics", "healthz", ""}


def test_it_can_be_read_without_being_seen() -> None:
    found = whole(report(disk("vda", JOB), disk("vdb")), report(disk("vdc", JOB), socket="/b"))
    levels = [int(tag[1]) for tag, _, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert found.all("html")[0][0]["lang"] == "en"
    assert len(found.all("main")) == 1
    assert len(found.all("table")) == len(found.all("caption")) == 2
    assert all(attributes.get("scope") == "row" for attributes, _ in found.all("th"))
    assert all(attributes.get("aria-label") for attributes, _ in found.all("progress"))
    assert all(
        attributes["role"] == "img" and attributes["aria-label"]
        for attributes, _ in found.all("svg")
    )
    names = [attributes["id"] for _, attributes, _ in found.elements if attributes.get("id")]
    assert len(set(names)) == len(names)
    labelled = [a["aria-labelledby"] for _, a, _ in found.elements if a.get("aria-labelledby")]
    assert set(labelled) <= set(names)


@given_in_parts(100, any_status())
def test_any_answer_can_be_shown(said: dict[str, Any]) -> None:
    assert "/run/a.qmp" in whole(Report("/run/a.qmp", 1.7e9, plain(said))).text


# The last minutes


def test_history_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(lambda: 0.0)
    key = ("/run/a.qmp", "vda", "vda")
    for number in range(5000):
        history.add(Report("/run/a.qmp", number / 2, status(disk("vda", JOB))))
        history.note("a", str(number))
    samples = history.samples(key)
    assert len(samples) <= SPAN_S / web_history.SAMPLE_S + 1
    assert samples[-1].time_s - samples[0].time_s <= SPAN_S
    assert [note.text for note in history.notes] == [str(4999 - n) for n in range(NOTES_MAX)]
    history.add(Report("/run/a.qmp", 3000.0, status(disk("vda"))))
    assert history.samples(key) == []


def test_events_of_a_restarted_process_are_newer() -> None:
    """Pages that stay open show those that are newer than what they have."""
    before, after = History(lambda: 1.7e9), History(lambda: 1.7e9 + 5)
    for _ in range(100):
        before.note("a", "b")
    after.note("a", "b")
    assert after.notes[0].number > before.notes[0].number


def test_events_are_items() -> None:
    history = History(lambda: 1.7e9)
    assert events_html([]) == ""
    history.note("/run/a.qmp", "first")
    history.note("/run/a.qmp", "second")
    items = Parsed(f"<body>{events_html(list(history.notes))}</body>").all("li")
    assert [text.split()[-1] for _, text in items] == ["second", "first"]


# Plots

VALUES = st.lists(st.none() | st.floats(0, 1e300), max_size=30)


@given_in_parts(100, VALUES, VALUES)
def test_points_are_in_the_picture(first: list[float | None], second: list[float | None]) -> None:
    count = min(len(first), len(second))
    times_s = [2.0 * number for number in range(count)]
    found = plot(times_s, first[:count], second[:count], now_s=2.0 * count, span_s=40.0)
    for line in found.lines:
        for piece in line.pieces:
            points = [tuple(map(float, point.split(","))) for point in piece.split()]
            assert len(points) > 1
            assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
            assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_a_gap_is_a_gap() -> None:
    found = plot([0, 1, 2, 3, 4], [1, 2, None, 4, 4], now_s=4, span_s=4)
    assert found.lines[0].pieces == ["0.0,45.0 75.0,30.0", "225.0,0.0 300.0,0.0"]
    assert (found.top, found.lines[0].now) == (4, 4)
