"""One conversation, two servers: what the comparison with qemu-storage-daemon is made of.

A script is a list of steps: commands, events to wait for, guest writes over NBD, faults that are
turned on and off. `converse` holds it with qemu-storage-daemon and with nbdmirror at the same time,
each with images, servers and faults of its own, and returns two transcripts: every answer and every
event in the order of arrival, by step. `assert_alike` demands that they are the same. What is meant
to differ is a `Difference`: it has a reason, and takes out of both what differs, nothing else.

On both sides the disk is called `src` (a node of the daemon, a disk of nbdmirror) and exported
under that name; the targets are added over QMP as `tgt`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nbd
import pytest
from clients import connected
from images import KiB, MiB, assert_identical, make_empty, make_image, make_noise
from qmpclient import Qmp, Refused
from serverprocess import Server
from servers import Nbdmirror, QemuNbd
from waiting import wait_until

STEP_S_MAX = 20.0
"""For one step; the longest thing that a script waits for is a back-off of 5 s."""

SCRIPT_S_MAX = 50.0

Kind = Literal["qsd", "nbdmirror"]
KINDS: tuple[Kind, ...] = ("qsd", "nbdmirror")


# What a script runs on


@dataclass(frozen=True, slots=True)
class Setting:
    """The servers and images of each side.

    `source` and `target`: "plain" is a raw file, the target's behind qemu-nbd; "faulty" is a raw
    file behind a server whose faults are switched by the script.
    """

    size: int = MiB
    target_size: int | None = None
    source: Literal["plain", "faulty"] = "plain"
    target: Literal["plain", "faulty", "none"] = "plain"
    source_content: Literal["noise", "runs", "empty"] = "noise"
    target_content: Literal["noise", "empty"] = "noise"
    source_options: tuple[str, ...] = ()
    target_read_only: bool = False


FAULTY = '''
"""nbdkit's Python plugin script: a file, and faults, each a file DIR/read, DIR/write or DIR/flush
with an errno's name and how often (or for ever), or "hold" for no answer until that changes."""
import errno, os, time
import nbdkit
API_VERSION = 2
SETTINGS, LEFT = {}, {}
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def config(key, value): SETTINGS[key] = value
def open(readonly): return os.open(SETTINGS["file"], os.O_RDWR)
def close(h): os.close(h)
def get_size(h): return os.fstat(h).st_size
def can_write(h): return True
def can_flush(h): return True
def can_fua(h): return nbdkit.FUA_NATIVE
def can_multi_conn(h): return True
def pread(h, buf, offset, flags):
    fault("read"); data = os.pread(h, len(buf), offset); buf[:] = data
def pwrite(h, buf, offset, flags): fault("write"); os.pwrite(h, buf, offset)
def flush(h, flags): fault("flush")
def fault(operation):
    while True:
        try:
            with __builtins__.open(os.path.join(SETTINGS["faults"], operation)) as file:
                what, times, number = file.read().split()
        except FileNotFoundError:
            return
        if what == "hold":
            time.sleep(0.003)
            continue
        left = LEFT.setdefault(number, int(times) if times.isdigit() else -1)
        if left == 0:
            return
        LEFT[number] = left - 1
        nbdkit.set_error(getattr(errno, what))
        raise OSError(getattr(errno, what), "a fault")
'''
FAULTY = FAULTY.replace("__builtins__.open", "io.open").replace("import errno", "import io, errno")


class Faulty(Server):
    """nbdkit with the plugin above. Faults outlive the server: they are files."""

    name = "faulty"

    def __init__(self, folder: Path, image: Path) -> None:
        super().__init__(folder)
        self.image = image
        self.faults = folder / f"faults{self.number}"
        self.faults.mkdir()
        self._serial = 0

    def argv(self) -> list[str]:
        script = self.folder / "faulty.py"
        script.write_text(FAULTY)
        file = f"file={self.image}"
        return [
            # Threads for as many requests as buf-size allows, and a flush while those are held.
            "nbdkit", "-f", "-t", "100", "-U", str(self.socket), "python", str(script), file,
            f"faults={self.faults}",
        ]  # fmt: skip

    def set(self, operation: str, fault: str, times: int | None = None) -> None:
        self._serial += 1
        new = self.faults / "new"
        new.write_text(f"{fault} {'ever' if times is None else times} {operation}{self._serial}")
        new.replace(self.faults / operation)

    def heal(self, operation: str) -> None:
        (self.faults / operation).unlink(missing_ok=True)


class StorageDaemon(Server):
    """qemu-storage-daemon with a monitor, and its node `src` exported."""

    name = "daemon"

    def __init__(self, folder: Path, source: str) -> None:
        """`source`: --blockdev's options beside the node's name."""
        super().__init__(folder)
        self.qmp_path = folder / f"monitor{self.number}"
        self.source = source

    def argv(self) -> list[str]:
        return [
            "qemu-storage-daemon",
            "--blockdev", f"node-name=src,{self.source}",
            "--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=16",
            "--export", "type=nbd,id=export0,node-name=src,name=src,writable=on",
            "--chardev", f"socket,id=monitor0,path={self.qmp_path},server=on,wait=off",
            "--monitor", "chardev=monitor0",
        ]  # fmt: skip

    def uri(self, export: str = "src") -> str:
        return super().uri(export)

    def is_ready(self) -> bool:
        return super().is_ready() and self.qmp_path.exists()

    def stop(self) -> None:
        """It may have been broken on purpose, and is not what is tested."""
        self.kill()


class Side:
    """One server with its images and targets, in a folder of its own, and what it said."""

    def __init__(self, kind: Kind, folder: Path, setting: Setting) -> None:
        self.kind = kind
        self.folder = folder
        self.setting = setting
        self.source_image = folder / "source.img"
        make = {"noise": make_noise, "runs": make_image}
        if setting.source_content == "empty":
            make_empty(self.source_image, setting.size)
        else:
            make[setting.source_content](self.source_image, setting.size, 1)
        self.stack = contextlib.ExitStack()
        self.faulty: dict[str, Faulty] = {}
        self.targets: dict[str, tuple[Server, Path]] = {}
        self.qmp: Qmp
        self.server: Nbdmirror | StorageDaemon
        self._guest: nbd.NBD | None = None

    def __enter__(self) -> Side:
        with contextlib.ExitStack() as stack:
            self._targets_stack = stack.enter_context(contextlib.ExitStack())
            if self.setting.target != "none":
                self._start_target(stack)
            self.server = stack.enter_context(self._server(stack))
            self.qmp = stack.enter_context(Qmp(self.server.qmp_path, timeout_s=STEP_S_MAX))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._guest = None
        self.stack.__exit__(*error)

    @property
    def uri(self) -> str:
        return self.server.uri("src")

    def target_socket(self, name: str = "tgt") -> str:
        return str(self.targets[name][0].socket)

    @property
    def guest(self) -> nbd.NBD:
        """One connection, from the first guest step to the end: also over a pivot."""
        if self._guest is None:
            self._guest = self.stack.enter_context(connected(self.uri))
        return self._guest

    def start_target(self, name: str, size: int, content: str = "noise") -> None:
        """One more, on qemu-nbd; it ends after the server."""
        image = self.folder / f"{name}.img"
        (make_noise if content == "noise" else make_empty)(image, size)
        server = self._targets_stack.enter_context(QemuNbd(self.folder, image))
        self.targets[name] = (server, image)

    def _start_target(self, stack: contextlib.ExitStack) -> None:
        setting = self.setting
        image = self.folder / "target.img"
        size = setting.size if setting.target_size is None else setting.target_size
        (make_noise if setting.target_content == "noise" else make_empty)(image, size)
        server: Server
        if setting.target == "faulty":
            server = self.faulty["target"] = Faulty(self.folder, image)
        else:
            server = QemuNbd(self.folder, image, read_only=setting.target_read_only)
        self.targets["tgt"] = (stack.enter_context(server), image)

    def _server(self, stack: contextlib.ExitStack) -> Nbdmirror | StorageDaemon:
        if self.setting.source == "faulty":
            server = Faulty(self.folder, self.source_image)
            self.faulty["source"] = stack.enter_context(server)
            qsd, disk = f"driver=nbd,server.type=unix,server.path={server.socket}", server.uri()
        else:
            qsd = f"driver=file,discard=unmap,filename={self.source_image}"
            disk = str(self.source_image)
        if self.kind == "qsd":
            return StorageDaemon(self.folder, qsd)
        options = self.setting.source_options
        mirror = Nbdmirror(self.folder, f"src={disk}", bare=True, options=options)
        mirror.allowed = [r"different sizes|has \d+ bytes"]
        return mirror


# Steps


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

    left_out = {"actively-synced"}  # since 8.2; see ACTIVELY_SYNCED
    if not progress:
        left_out |= {"len", "offset", "current-progress", "total-progress"}

    def run(side: Side) -> None:
        for command in ("query-block-jobs", "query-jobs"):
            with untold(side):
                jobs = side.qmp.execute(command)
            for job in jobs:
                kept = {key: value for key, value in job.items() if key not in left_out}
                note(side, f"{command}: {shown(kept)}")

    return Step("query", run)


def until(is_so: Callable[[Mapping[str, Any]], bool], what: str, job: str = "j") -> Step:
    """Poll query-block-jobs; the polling leaves no trace."""

    def run(side: Side) -> None:
        def look() -> bool:
            return is_so(side.qmp.job(job))

        with untold(side):
            wait_until(look, what, STEP_S_MAX)

    return Step(f"{WAIT}until {what}", run)


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


def bitmaps() -> Step:
    """The named bitmaps of src, as query-named-block-nodes has them."""

    def run(side: Side) -> None:
        with untold(side):
            nodes = side.qmp.execute("query-named-block-nodes")
        for node in nodes:
            if node["node-name"] == "src":
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
        given = {"job_id": "j", "device": "src", "sync": "full", "mode": "existing"}
        given |= {"auto_dismiss": False, "target": target.replace("SOCKET", side.target_socket())}
        with contextlib.suppress(Refused):
            side.qmp.execute("drive-mirror", **{**given, **options})

    return Step(f"drive-mirror {target} {options}", run)


def start(**options: Any) -> list[Step]:
    return [add(), mirror(**options)]


def dismiss() -> list[Step]:
    return [do("job-dismiss", id="j"), query()]


SLOW: dict[str, Any] = {"speed": 64 * KiB, "buf_size": 64 * KiB}
"""A job that stays in `running`."""


# The conversation


@dataclass(slots=True)
class Transcript:
    kind: Kind
    lines: list[str] = field(default_factory=list)
    failure: BaseException | None = None


def converse(folder: Path, setting: Setting, script: Script) -> tuple[Transcript, Transcript]:
    """Hold the conversation with both, at the same time."""
    transcripts = [Transcript(kind) for kind in KINDS]
    threads = []
    for transcript in transcripts:
        place = folder / transcript.kind[0]
        place.mkdir()
        thread = threading.Thread(
            target=_hold, args=(transcript, place, setting, list(_flat(script))), daemon=True
        )
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join(SCRIPT_S_MAX)
        assert not thread.is_alive(), "a conversation does not end"
    return transcripts[0], transcripts[1]


def _flat(script: Script) -> Iterator[Step]:
    for step in script:
        if isinstance(step, Step):
            yield step
        else:
            yield from _flat(step)


def _hold(transcript: Transcript, folder: Path, setting: Setting, steps: list[Step]) -> None:
    log: list[dict[str, Any]] = []
    try:
        with Side(transcript.kind, folder, setting) as side:
            side.qmp.forget()
            log = side.qmp.log
            for step in steps:
                log.append({"step": step.text})
                step.run(side)
            with contextlib.suppress(OSError):  # it may have been told to quit
                side.qmp.execute("query-jobs")  # what was on its way arrives before the answer
    except BaseException as error:  # noqa: BLE001 - raised again by assert_alike
        transcript.failure = error
    lines = [line.replace(str(folder), "DIR") for line in map(_line, log)]
    if transcript.failure is None:
        lines = [line for line in lines if not line.startswith(f"-- {WAIT}")]
    transcript.lines = list(filter(None, lines))


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


def _line(message: Mapping[str, Any]) -> str:
    if "step" in message:
        return f"-- {message['step']}"
    if "note" in message:
        return f"   {message['note']}"
    if "event" in message:
        name = message["event"]
        return "" if name.startswith("X_NBDMIRROR_") else f"<- {name} {shown(message['data'])}"
    if "error" in message:
        return f"<- {message['error']['class']}: {message['error']['desc']}"
    return "<- return"


# What is meant to differ

Rewrite = Callable[[list[str]], list[str]]


@dataclass(frozen=True, slots=True)
class Difference:
    """`rewrite` takes it out of a transcript; it is applied to both."""

    name: str
    why: str
    rewrite: Rewrite


def without(pattern: str) -> Rewrite:
    return lambda lines: [line for line in lines if not re.search(pattern, line)]


def substituted(pattern: str, replacement: str) -> Rewrite:
    return lambda lines: [re.sub(pattern, replacement, line) for line in lines]


def without_step(pattern: str) -> Rewrite:
    """What was said in the steps whose text matches."""

    def rewrite(lines: list[str]) -> list[str]:
        kept: list[str] = []
        is_left_out = False
        for line in lines:
            if line.startswith("--"):
                is_left_out = re.search(pattern, line) is not None
            elif is_left_out:
                continue
            kept.append(line)
        return kept

    return rewrite


def repeated_once(pattern: str) -> Rewrite:
    """Of all lines that match between two steps, the first."""

    def rewrite(lines: list[str]) -> list[str]:
        kept: list[str] = []
        for line in lines:
            if re.search(pattern, line):
                since = kept[_last_step(kept) :]
                if line in since:
                    continue
            kept.append(line)
        return kept

    return rewrite


def _answer_second(lines: list[str], pattern: str) -> list[str]:
    """In the steps that match, the answer comes after the first event."""
    kept = list(lines)
    for number, line in enumerate(kept):
        if re.match(pattern, line) and "<- return" in kept[number + 2 :]:
            answer = kept.index("<- return", number + 1)
            if not any(text.startswith("--") for text in kept[number + 1 : answer]):
                kept.insert(number + 2, kept.pop(answer))
    return kept


def _answer_third(lines: list[str]) -> list[str]:
    """After `created` and `running`, where READY comes before the next step."""
    kept = list(lines)
    for number, line in enumerate(kept):
        if line.startswith("-- blockdev-mirror") and 'status="running"' in "".join(
            kept[number + 2 : number + 3]
        ):
            answer = kept.index("<- return", number + 1)
            if not any(text.startswith("--") for text in kept[number + 1 : answer]):
                kept.insert(number + 3, kept.pop(answer))
    return kept


def _last_step(lines: list[str]) -> int:
    return max((n for n, line in enumerate(lines) if line.startswith("--")), default=0)


BUSY = Difference(
    "busy while running",
    "QEMU shows whether the job's coroutine waits for I/O or sleeps just now; that is timing",
    substituted(r'busy=\w+(.*status="(?:running|ready)")', r"busy=?\1"),
)
PROGRESS = Difference(
    "len and offset",
    "how much was copied when the job was stopped is timing",
    substituted(r"\b(len|offset|current-progress|total-progress)=\d+", r"\1=?"),
)
ACTIVELY_SYNCED = Difference(
    "actively-synced",
    "query-block-jobs has it since QEMU 8.2, the comparison is with 7.2; `query` leaves it out",
    lambda lines: lines,
)
BACK_OFF = Difference(
    "back-off under `ignore`",
    "QEMU tries again at once and floods thousands of events a second; rule 42 forbids spinning",
    without(r'BLOCK_JOB_ERROR action="ignore"'),
)
ONE_ERROR_A_STOP = Difference(
    "one BLOCK_JOB_ERROR a stop",
    "QEMU tells one for each operation in flight; nbdmirror one for each pause, as rule 21 says",
    repeated_once("BLOCK_JOB_ERROR"),
)

NEVER_RAN = Difference(
    "no events of a job that never was",
    "QEMU creates the job before it looks at some arguments, and so tells `created` and `null`",
    without(r'JOB_STATUS_CHANGE .*status="(created|null)"'),
)

CONNECT_TEXTS = Difference(
    "what cannot be connected to",
    "nbdmirror names the URI, and says what libnbd says; QEMU names the address alone",
    substituted(r"(GenericError: Failed to connect to ).*: ([^:]*)", r"\1X: \2"),
)

RESUME_ANSWER = Difference(
    "when the answer to resume comes",
    "after the change of the state; QEMU's job may already have had its next error by then",
    lambda lines: _answer_second(lines, r"-- (block-)?job-resume"),
)

START_ANSWER = Difference(
    "when the answer to blockdev-mirror comes",
    "where nothing is to be copied, QEMU's job may be READY before or after it: so it does by "
    "itself, from run to run",
    _answer_third,
)

ALWAYS = (BUSY, ACTIVELY_SYNCED, RESUME_ANSWER, START_ANSWER)


def assert_alike(
    folder: Path, setting: Setting, script: Script, *differences: Difference
) -> tuple[Transcript, Transcript]:
    """Both sides did every step, and said the same, but for the named differences."""
    both = converse(folder, setting, script)
    for transcript in both:
        for difference in (*ALWAYS, *differences):
            transcript.lines = difference.rewrite(transcript.lines)
    qsd, ours = both
    for transcript in both:
        if transcript.failure is not None:
            text = "\n".join(difflib.unified_diff(qsd.lines, ours.lines, "qsd", "nbdmirror", n=6))
            reason = str(transcript.failure).split("; heard")[0]
            pytest.fail(
                f"{transcript.kind}: {type(transcript.failure).__name__}: {reason}\n"
                f"{text or _tail(transcript)}",
                pytrace=False,
            )
    if qsd.lines != ours.lines:
        text = "\n".join(difflib.unified_diff(qsd.lines, ours.lines, "qsd", "nbdmirror", n=8))
        pytest.fail(f"they differ:\n{text}", pytrace=False)
    return both


def _tail(transcript: Transcript) -> str:
    return "\n".join(transcript.lines[-30:])


def is_root() -> bool:
    return os.geteuid() == 0
