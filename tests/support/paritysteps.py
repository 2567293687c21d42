"""The steps of a conversation with two servers: commands, events to wait for, guest writes over
NBD, faults that are turned on and off, and looks at what came of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nbd
from support.clients import connected
from support.images import KiB, assert_identical
from support.paritysides import STEP_S_MAX, Side
from support.parityversions import has
from support.qmpclient import Refused
from support.waiting import wait_until


@dataclass(frozen=True, slots=True)
class Step:
    text: str
    run: Callable[[Side], None]


Script = Sequence["Step | Script"]

WAIT = "wait "
"""Steps that begin so leave no line: what arrives is told in the order of arrival, whenever that
is."""


def do(command: str, *, extra: Mapping[str, Any] | None = None, **arguments: Any) -> Step:
    """A command; its answer goes into the transcript. '_' in names stands for '-'. `extra`:
    arguments that only nbdmirror knows."""

    def run(side: Side) -> None:
        more = dict(extra or {}) if side.kind == "nbdmirror" else {}
        with contextlib.suppress(Refused):
            side.qmp.execute(command, **arguments, **more)

    shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return Step(f"{command}({shown})", run)


def raw(command: str, arguments: Any) -> Step:
    """As `do`, with the arguments exactly as given: for those that are wrong."""

    def run(side: Side) -> None:
        with contextlib.suppress(Refused):
            side.qmp.execute(command, **arguments)

    return Step(f"{command} {json.dumps(arguments)[:160]}", run)


def event(name: str, **fields: Any) -> Step:
    def run(side: Side) -> None:
        side.qmp.wait_for_event(name, STEP_S_MAX, **fields)

    return Step(f"{WAIT}for {name} {fields or ''}".rstrip(), run)


def status(wanted: str, job: str = "j") -> Step:
    return event("JOB_STATUS_CHANGE", id=job, status=wanted)


def error_event(operation: str, action: str, job: str = "j") -> Step:
    return event("BLOCK_JOB_ERROR", device=job, operation=operation, action=action)


def ready(job: str = "j") -> Step:
    return event("BLOCK_JOB_READY", device=job)


def fault(where: str, operation: str, name: str, times: int | None = None) -> Step:
    """An errno's name, or "hold": no answer until the fault is changed. `times`: for ever."""
    return Step(
        f"fault: {where} {operation} {name} {times or ''}".rstrip(),
        lambda side: side.faulty[where].set(operation, name, times),
    )


def held(where: str, operation: str) -> Step:
    return Step(
        f"held: {where} {operation}",
        lambda side: wait_until(
            side.faulty[where].held(operation).exists, "a request is held", STEP_S_MAX
        ),
    )


def heal(where: str, operation: str) -> Step:
    return Step(f"healed: {where} {operation}", lambda side: side.faulty[where].heal(operation))


def write(offset: int = 0, length: int = 64 * KiB, seed: int = 7) -> Step:
    """A guest's write; its errno goes into the transcript."""

    def run(side: Side) -> None:
        data = random.Random(seed + offset).randbytes(length)
        try:
            side.guest.pwrite(data, offset)
            note(side, f"guest write {offset}+{length}: done")
        except nbd.Error as error:
            note(side, f"guest write {offset}+{length}: {error.errnum}")

    return Step(f"guest writes {offset}+{length}", run)


def zero(offset: int, length: int) -> Step:
    def run(side: Side) -> None:
        side.guest.zero(length, offset)

    return Step(f"guest zeroes {offset}+{length}", run)


def flush() -> Step:
    return Step("guest flushes", lambda side: side.guest.flush())


def query(*, progress: bool = True) -> Step:
    """query-block-jobs and query-jobs, in a state that lasts; `progress`: len and offset too."""

    left_out = set() if progress else {"len", "offset", "current-progress", "total-progress"}

    def run(side: Side) -> None:
        for command in ("query-block-jobs", "query-jobs"):
            with untold(side):
                jobs = side.qmp.execute(command)
            for job in jobs:
                kept = {key: value for key, value in job.items() if key not in left_out}
                note(side, f"{command}: {shown(kept)}")

    return Step("query", run)


def node(name: str = "tgt", *, image: bool = False) -> Step:
    """What query-named-block-nodes says of it, but for names of files. `image`: its size and its
    block sizes."""

    def run(side: Side) -> None:
        with untold(side):
            nodes = side.qmp.execute("query-named-block-nodes", flat=True)
        found = [info for info in nodes if info["node-name"] == name]
        for info in found:
            sizes = {key: value for key, value in info["image"].items() if key in IMAGE_SIZES}
            if "limits" in sizes:
                sizes["limits"] = {key: sizes["limits"].get(key) for key in BLOCK_SIZES}
            told = sizes if image else {key: value for key, value in info.items() if key != "image"}
            note(side, f"node {name}: {_words(told)}")
        if not found:
            note(side, f"no node {name}")

    return Step(f"query node {name}", run)


IMAGE_SIZES = ("virtual-size", "limits")
BLOCK_SIZES = ("request-alignment", "opt-transfer", "max-transfer")


def _words(info: Mapping[str, Any]) -> str:
    """One word a member; generated names and those of files are all alike."""
    words = {
        key: json.dumps(value, separators=(",", ":"), sort_keys=True) for key, value in info.items()
    }
    words |= {"file": "?"} if "file" in words else {}
    return re.sub(r"#block\d+", "#block", " ".join(f"{key}={words[key]}" for key in sorted(words)))


def until(is_so: Callable[[Mapping[str, Any]], bool], what: str, job: str = "j") -> Step:
    """Poll query-block-jobs; the polling leaves no trace."""

    def run(side: Side) -> None:
        def look() -> bool:
            return is_so(side.qmp.job(job))

        with untold(side):
            wait_until(look, what, STEP_S_MAX)

    return Step(f"{WAIT}until {what}", run)


def change(job: str = "j") -> Step:
    """The copy mode, while it runs: to the only other one that QEMU changes to."""
    return do("block-job-change", id=job, type="mirror", copy_mode="write-blocking")


ACTIVELY_SYNCED = until(lambda job: job.get("actively-synced", True), "it is actively synced")
"""Of a QEMU that does not tell it is believed."""


def in_sync(job: str = "j") -> Step:
    """Until everything that a guest has written so far is on the target. `len` alone does not tell:
    QEMU looks at its bitmap only now and then."""

    def run(side: Side) -> None:
        with untold(side):
            wait_until(lambda: not dirty_bytes(side) and is_idle(side), "it is in sync", STEP_S_MAX)

    def is_idle(side: Side) -> bool:
        info = side.qmp.job(job)
        return bool(info["len"] == info["offset"] and not info["busy"])

    return Step(f"{WAIT}until {job} is in sync", run)


def dirty_bytes(side: Side) -> int:
    """QEMU lists a mirror's own bitmap, without a name; for nbdmirror see its status."""
    if side.kind == "qsd":
        nodes = side.qmp.execute("query-named-block-nodes")
        found = [bitmap for node in nodes for bitmap in node.get("dirty-bitmaps", ())]
        return sum(bitmap["count"] for bitmap in found if "name" not in bitmap)
    disks = side.qmp.execute("x-nbdmirror-query-status")["disks"]
    jobs = [job for disk in disks for job in disk["jobs"]]
    return sum(job["dirty-bytes"] + job["in-flight-bytes"] for job in jobs)


def bitmaps(name: str = "src") -> Step:
    """The named bitmaps of a node, as query-named-block-nodes has them."""

    def run(side: Side) -> None:
        with untold(side):
            nodes = side.qmp.execute("query-named-block-nodes")
        for node in nodes:
            if node["node-name"] == name:
                found = [b for b in node.get("dirty-bitmaps", ()) if b.get("name")]
                note(side, f"bitmaps: {[shown(b) for b in found]}")

    return Step("query bitmaps", run)


def images(*, equal: bool = True, target: bool = True, name: str = "tgt") -> Step:
    """What the files hold and what the export serves. `equal`: the target is the source, on each
    side by itself, too. `target`: False where it is undefined."""

    def run(side: Side) -> None:
        with connected(side.uri) as guest:
            size = guest.get_size()
            served = bytes(guest.pread(size, 0)) if size else b""
        source = side.source_image.read_bytes()
        note(side, f"source {digest(source)} served {digest(served)}")
        if target:
            copy = side.targets[name][1].read_bytes()
            note(side, f"target {digest(copy)}")
            if equal:
                assert_identical(source, copy)

    return Step("images", run)


def swapped() -> Step:
    """After a pivot: a guest's write arrives on the target and not on the source."""

    def run(side: Side) -> None:
        before = side.source_image.read_bytes()
        side.guest.pwrite(b"\x5a" * 4096, 4096)
        side.guest.flush()
        assert before == side.source_image.read_bytes(), "the source is still served"
        assert side.targets["tgt"][1].read_bytes()[4096:8192] == b"\x5a" * 4096

    return Step("the export is on the target", run)


def is_served(name: str) -> Callable[[Side], None]:
    """For `call`: what the disk holds is on the target `name`."""

    def check(side: Side) -> None:
        held = side.targets[name][1].read_bytes()
        assert bytes(side.guest.pread(len(held), 0)) == held

    return check


def call(text: str, run: Callable[[Side], None]) -> Step:
    return Step(text, run)


def add(node: str = "tgt", target: str = "tgt", **options: Any) -> Step:
    def run(side: Side) -> None:
        server = {"type": "unix", "path": side.target_socket(target)}
        with contextlib.suppress(Refused):
            side.qmp.execute("blockdev-add", driver="nbd", node_name=node, server=server, **options)

    return Step(f"blockdev-add {node}", run)


def mirror(*, extra: Mapping[str, Any] | None = None, **options: Any) -> Step:
    """blockdev-mirror of src to tgt as the job "j", to be dismissed by hand."""
    given = {"job_id": "j", "device": "src", "target": "tgt", "sync": "full"}
    return do("blockdev-mirror", extra=extra, **{**given, "auto_dismiss": False, **options})


def known(options: Mapping[str, bool]) -> dict[str, Any]:
    """For `mirror`: of `options`, what the installed QEMU knows for both sides, the rest for
    nbdmirror alone."""
    shared = {"target-is-zero"} if has("target-is-zero") else set()
    both = {key.replace("-", "_"): options[key] for key in options if key in shared}
    return {**both, "extra": {key: options[key] for key in options if key not in shared}}


def raw_node(name: str, file: Any, **options: Any) -> Step:
    """`file`: a node, or a dict of options of one that is made with it; SOCKET is added."""

    def run(side: Side) -> None:
        server = {"type": "unix", "path": side.target_socket()}
        below = {"driver": "nbd", "server": server, **file} if isinstance(file, dict) else file
        with contextlib.suppress(Refused):
            side.qmp.execute("blockdev-add", driver="raw", node_name=name, file=below, **options)

    return Step(f"blockdev-add raw {name} on {file} {options}", run)


def drive(target: str, **options: Any) -> Step:
    """drive-mirror as the job "j"; SOCKET stands for the target's."""

    def run(side: Side) -> None:
        given: dict[str, Any] = {"job_id": "j", "device": "src", "sync": "full"}
        given |= {"mode": "existing", "auto_dismiss": False}
        given |= {"target": target.replace("SOCKET", side.target_socket())}
        with contextlib.suppress(Refused):
            side.qmp.execute("drive-mirror", **{**given, **options})

    return Step(f"drive-mirror {target} {options}", run)


def start(**options: Any) -> list[Step]:
    return [add(), mirror(**options)]


def dismiss() -> list[Step]:
    return [do("job-dismiss", id="j"), query()]


SLOW: dict[str, Any] = {"speed": 64 * KiB, "buf_size": 64 * KiB}
"""A job that stays in `running`."""

STARTED = until(lambda job: job["offset"] > 0, "something is copied")
"""Its first write is answered: a cancel by force does not leave it behind at the target."""


def note(side: Side, line: str) -> None:
    """Into the transcript."""
    side.qmp.log.append({"note": line})


@contextlib.contextmanager
def untold(side: Side, *, events: bool = False) -> Iterator[None]:
    """The answers to the commands in it are not part of the conversation; nor are the events, if
    `events`."""
    log, mark = side.qmp.log, len(side.qmp.log)
    yield
    kept = [] if events else [message for message in log[mark:] if "event" in message]
    log[mark:] = kept


def shown(data: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={json.dumps(data[key])}" for key in sorted(data))


def digest(data: bytes) -> str:
    return f"{len(data)}:{hashlib.sha256(data).hexdigest()[:12]}"
