"""The page for people, in the words of the command line. The texts of servers are not trusted: the
templates escape all of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from nbdmirror.cli import words
from nbdmirror.cli.progress import Meter, Progress
from nbdmirror.cli.status import result_text
from nbdmirror.web import picture
from nbdmirror.web.history import SPAN_S, History, Note
from nbdmirror.web.plot import HEIGHT, WIDTH, Plot, plot
from nbdmirror.web.records import Key, Record, Report, is_well, member, number

GOOD, BUSY, BAD = "good", "busy", "bad"
"""How it is with a disk, a job or a server."""

FOLDER = Path(__file__).parent
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True, slots=True)
class Job:
    name: str
    state: str
    mood: str
    target: str
    percent: float
    facts: list[str]
    rows: list[tuple[str, str]]
    """Names, and values with their units."""
    remarks: list[tuple[str, str]]
    """Classes of the style sheet, and texts."""
    picture: picture.DiskPicture | None
    rates: Plot
    lag: Plot
    is_plotted: bool


@dataclass(frozen=True, slots=True)
class Disk:
    name: str
    facts: list[str]
    source: str
    trouble: list[str]
    jobs: list[Job]
    last: str
    """How the last job ended, if there is none now."""


@dataclass(frozen=True, slots=True)
class Server:
    socket: str
    package: str
    since: str
    moment: str
    """Of the status: what is behind may be further behind since."""
    trouble: list[str]
    disks: list[Disk]


def page(host: str, servers: str, history: History, silent_ms: int) -> str:
    """`servers`: what servers_html has made. `silent_ms`: a page that has heard nothing for longer
    is not live."""
    events = events_html(list(history.notes))
    template = _ENVIRONMENT.get_template("page.html")
    return template.render(host=host, servers=servers, events=events, silent_ms=silent_ms)


def servers_html(reports: list[Report], history: History, unanswered: int = 0) -> str:
    """The part of the page that changes. `unanswered`: servers beside those of the reports."""
    template = _ENVIRONMENT.get_template("servers.html")
    return template.render(
        servers=[_shown(report, history) for report in reports],
        width=WIDTH,
        height=HEIGHT,
        unanswered=unanswered,
        map_height=picture.HEIGHT,
        kinds=picture.kinds(),
        minutes=int(SPAN_S / 60),
        rate=lambda value: "-" if value is None else f"{words.size(value)}/s",
        seconds=_seconds,
    )


def events_html(notes: list[Note]) -> str:
    """Items of a list, the newest first."""
    template = _ENVIRONMENT.get_template("events.html")
    return template.render(notes=[(note, _moment(note.time_s)) for note in notes])


def _shown(report: Report, history: History) -> Server:
    try:
        return _server(report, history)
    except Exception as error:  # noqa: BLE001 - the others are to be shown nevertheless
        return Server(report.socket, "", "", "", [words.not_understood(error)], [])


def _server(report: Report, history: History) -> Server:
    status = report.status
    since = number(status.get("started-at-s"))
    return Server(
        socket=report.socket,
        package=_text(status.get("package")),
        since="" if since is None else _moment(since, "%Y-%m-%d %H:%M:%S"),
        moment="" if report.error else _moment(report.time_s),
        trouble=[*([report.error] if report.error else []), *words.server_troubles(status)],
        disks=[
            _disk(disk, [_job(*job, history, report) for job in report.jobs(disk)])
            for disk in report.disks
        ],
    )


def _disk(disk: Record, jobs: list[Job]) -> Disk:
    size = number(disk.get("size"))
    last = member(disk, "last-job")
    return Disk(
        name=_text(disk.get("name")),
        facts=[
            *([] if size is None else [words.size(size)]),
            "read-only" if disk.get("read-only") else "read-write",
        ],
        source=_text(disk.get("source")),
        trouble=words.disk_troubles(disk),
        jobs=jobs,
        last=result_text(last) if last and not jobs else "",
    )


def _job(key: Key, job: Record, history: History, report: Report) -> Job:
    progress = Meter(time.monotonic).update(job)
    samples = history.samples(key)
    times_s = [sample.time_s for sample in samples]
    remarks = [
        ("trouble" if remark.is_trouble else "note", remark.text) for remark in words.remarks(job)
    ]
    now_s = report.time_s
    return Job(
        name=_text(job.get("device")),
        state=words.state(job),
        mood=_mood(job),
        target=_text(job.get("target")),
        percent=min(100.0, max(0.0, progress.percent)),
        facts=[text for text in (words.doing(job), words.cost(job)) if text],
        rows=_rows(job, progress, now_s),
        remarks=remarks,
        picture=picture.disk_picture(report.maps.get(str(job.get("device", "")), {})),
        rates=plot(
            times_s,
            [sample.copied_bytes_per_s for sample in samples],
            [sample.dirtied_bytes_per_s for sample in samples],
            now_s=now_s,
            span_s=SPAN_S,
        ),
        lag=plot(times_s, [sample.lag_s for sample in samples], now_s=now_s, span_s=SPAN_S),
        is_plotted=len(samples) > 1,
    )


def _mood(job: Record) -> str:
    if (
        not is_well(job)
        or job.get("falling-behind")
        or job.get("error")
        or job.get("status") == "aborting"
    ):
        return BAD
    return GOOD if job.get("status") == "ready" else BUSY


def _rows(job: Record, progress: Progress, now_s: float) -> list[tuple[str, str]]:
    """Those that mean something, in the order of what an operator asks."""
    found: list[tuple[str, str]] = []

    def add(name: str, key: str, unit: str = "") -> None:
        if (value := number(job.get(key))) is not None:
            found.append((name, _seconds(value) if unit == "s" else f"{words.size(value)}{unit}"))

    add("The target is behind by", "lag-s", "s")
    found.append(("Left to copy", words.size(progress.left)))
    if not job.get("ready"):
        add("Time left, as predicted", "left-s", "s")
        if progress.rates and (end := progress.rates.end(now_s, is_following=False)):
            found.append(("Predicted end", end))
    add("Dirty", "dirty-bytes")
    add("In flight", "in-flight-bytes")
    add("Not flushed", "unflushed-bytes")
    add("Copied", "copy-bytes-per-s", "/s")
    add("Changed by guests", "dirty-bytes-per-s", "/s")
    changed, sent = number(job.get("changed-bytes")), number(job.get("sent-bytes"))
    if changed and sent is not None:
        text = f"{words.size(sent)} for {words.size(changed)} ({sent / changed:.2f})"
        found.append(("Sent since READY, for what guests changed", text))
    found += _of_points(member(job, "x-nbdmirror-points"))
    if mode := words.mode(job):
        found.append(("Copy mode", mode))
    if speed := number(job.get("speed")):
        found.append(("Speed limit", f"{words.size(speed)}/s"))
    for period, text in words.shares(job).items():
        found.append((f"Time {period}", text.replace(" %", "\N{NO-BREAK SPACE}%")))
    return found


def _of_points(points: Record) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    time_s, sequence = number(points.get("time-s")), number(points.get("sequence"))
    if time_s is not None and sequence is not None:
        found.append(("Last point", f"{sequence:.0f}, of {_moment(time_s)}"))
    count, reaches_s = number(points.get("points")), number(points.get("reaches-s"))
    if count is not None and reaches_s is not None:
        found.append(("Points to recover", f"{count:.0f}, back to {words.duration(reaches_s)} ago"))
    used, room = number(points.get("journal-used-bytes")), number(points.get("journal-bytes"))
    if used is not None and room is not None:
        found.append(("Journal", f"{words.size(used)} of {words.size(room)} used"))
    if (lasts_s := number(points.get("journal-lasts-s"))) is not None:
        found.append(("An outage may last", words.duration(int(lasts_s))))
    if (rpo_s := number(points.get("rpo-s"))) is not None:
        found.append(("Promised to be behind by", f"{words.age(rpo_s)} at most"))
    return found


def _seconds(value: float | None) -> str:
    return "-" if value is None else words.age(value)


def _moment(time_s: float, form: str = "%H:%M:%S") -> str:
    return time.strftime(form, time.localtime(time_s))


def _text(value: Any) -> str:
    return "" if value is None else str(value)
