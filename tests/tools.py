"""What tests are made of: servers of every kind, images, a guest that verifies, a QMP client that
records, and `assert_identical`.

Servers come unstarted: `with QemuNbd(folder, image) as target:`, or `start(QemuNbd(...))` with the
fixture. Nothing here sleeps for a guessed time: every wait polls, or is woken, and has a bound.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import select
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import nbd

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "plugin" / "nbdmirror-plugin.py"

START_S_MAX = 20.0
STOP_S_MAX = 10.0
WAIT_S_MAX = 30.0
POLL_S = 0.01

KiB, MiB = 1 << 10, 1 << 20
CHUNK_BYTES = 4 * MiB

_numbers = itertools.count(1)


def wait_until(is_so: Callable[[], Any], what: str, timeout_s: float = WAIT_S_MAX) -> Any:
    """Poll until `is_so` gives something true, and return that."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := is_so()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Images

Content = bytes | bytearray | Path | str
"""What can be compared: bytes, a raw file, or an NBD URI."""

_RUNS = (1, 511, 512, 4095, 4096, 10_000, 65_536, 70_001, 131_072, 300_000)


def make_image(path: Path, size: int, seed: int = 1) -> Path:
    """A raw file of noise, holes and written zeroes, in runs of odd lengths at odd places."""
    noise = random.Random(seed)
    with path.open("wb") as file:
        offset = 0
        while offset < size:
            length = min(noise.choice(_RUNS) * noise.randint(1, 3), size - offset)
            kind = noise.random()
            if kind < 0.55:
                os.pwrite(file.fileno(), noise.randbytes(length), offset)
            elif kind < 0.7:
                os.pwrite(file.fileno(), bytes(length), offset)
            offset += length
        file.truncate(size)
    return path


def make_noise(path: Path, size: int, seed: int = 99) -> Path:
    """A raw file of noise alone: whatever shines through from it is seen."""
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def make_empty(path: Path, size: int) -> Path:
    """A raw file that is one hole."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def make_qcow2(path: Path, size: int, *options: str) -> Path:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(size)]
    subprocess.run(command, check=True, timeout=WAIT_S_MAX)
    return path


def allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def chunks(content: Content) -> Iterator[bytes]:
    if isinstance(content, bytes | bytearray):
        for start in range(0, len(content), CHUNK_BYTES):
            yield bytes(content[start : start + CHUNK_BYTES])
    elif isinstance(content, Path):
        with content.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    else:
        with connected(content) as guest:
            size = guest.get_size()
            most = guest.get_block_size(nbd.SIZE_MAXIMUM) or CHUNK_BYTES
            for start in range(0, size, CHUNK_BYTES):
                chunk = bytearray()
                for at in range(start, min(start + CHUNK_BYTES, size), min(most, CHUNK_BYTES)):
                    chunk += guest.pread(min(most, CHUNK_BYTES, size - at), at)
                yield bytes(chunk)


def assert_identical(source: Content, target: Content) -> None:
    """Byte by byte; tells the first byte that differs, and how many do."""
    offset, first, differing = 0, -1, 0
    for left, right in itertools.zip_longest(chunks(source), chunks(target), fillvalue=b""):
        assert len(left) == len(right), f"one ends within {len(left)}:{len(right)} of {offset}"
        if left != right:
            where = [i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
            first = offset + where[0] if first < 0 else first
            differing += len(where)
        offset += len(left)
    assert not differing, f"{differing} of {offset} bytes differ, the first at {first}"


# NBD clients


def connections(socket: Path) -> int:
    """How many are open to a server that listens on this Unix socket."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return sum(line.endswith(f" {socket}") for line in lines) - 1  # one is the listener's


@contextlib.contextmanager
def connected(uri: str) -> Iterator[nbd.NBD]:
    """A libnbd handle with base:allocation, in strict mode off: the server is to be asked
    anything."""
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.set_strict_mode(0)
    handle.set_uri_allow_local_file(True)  # keys of TLS
    handle.connect_uri(uri)
    try:
        yield handle
    finally:
        if handle.aio_is_ready():
            handle.shutdown()


def nbd_errno(call: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    """The errno that the server answers with; 0 where it succeeds."""
    try:
        call(*arguments, **options)
    except nbd.Error as error:
        return int(error.errnum)
    return 0


class InThread:
    """A call in a thread of its own; `result` waits for it and raises what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised again by `result`
            self._error = error

    def has_ended_within(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> None:
        assert self.has_ended_within(30), "the request does not return"
        if self._error is not None:
            raise self._error


class Guest:
    """Writers that know what the disk holds: threads, each with a connection and a zone of its own.

    Seeded; writes (FUA and not), zeroes (hole or not), trims, flushes and reads, at odd places. A
    read that is not what was written, and any error, fails the test at `stop`. `model` is what the
    disk must hold then.
    """

    def __init__(
        self,
        uri: str,
        initial: Content,
        *,
        seed: int = 1,
        connections: int = 1,
        pause_s: float = 0.001,
        length_max: int = 70_000,
    ) -> None:
        self.model = bytearray().join(chunks(initial))
        self.requests = 0
        self.longest_s = 0.0
        self._uri = uri
        self._pause_s = pause_s
        self._length_max = length_max
        self._failure: BaseException | None = None
        self._stopping = threading.Event()
        zone = len(self.model) // connections
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(seed * 1000 + n, n * zone, zone),
                daemon=True,
                name=f"guest{n}",
            )
            for n in range(connections)
        ]

    def start(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> Self:
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(WAIT_S_MAX)
                assert not thread.is_alive(), "a guest's request does not return"
        if self._failure is not None:
            raise self._failure
        return self

    def wait_for_requests(self, number: int, timeout_s: float = WAIT_S_MAX) -> None:
        """Until that many more are done: the guest lives."""
        goal = self.requests + number
        wait_until(
            lambda: self.requests >= goal or self._failure, f"{number} guest requests", timeout_s
        )
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.stop()
        else:
            self._stopping.set()

    def _run(self, seed: int, start: int, length: int) -> None:
        noise = random.Random(seed)
        try:
            with connected(self._uri) as handle:
                while not self._stopping.is_set():
                    began_s = time.monotonic()
                    self._request(handle, noise, start, length)
                    self.longest_s = max(self.longest_s, time.monotonic() - began_s)
                    self.requests += 1
                    if self._pause_s:
                        self._stopping.wait(self._pause_s)
                for at in range(start, start + length, CHUNK_BYTES):
                    self._verify(handle, at, min(CHUNK_BYTES, start + length - at))
                handle.flush()
        except BaseException as error:  # noqa: BLE001 - raised again by `stop`, in the test
            self._failure = error

    def _request(self, handle: nbd.NBD, noise: random.Random, start: int, zone: int) -> None:
        length = min(zone, noise.choice((1, 512, 4096, 4096, noise.randint(1, self._length_max))))
        offset = start + noise.randint(0, zone - length)
        kind = noise.random()
        fua = nbd.CMD_FLAG_FUA if noise.random() < 0.1 else 0
        if kind < 0.6:
            data = noise.randbytes(length)
            handle.pwrite(data, offset, fua)
            self.model[offset : offset + length] = data
        elif kind < 0.75:
            hole = nbd.CMD_FLAG_NO_HOLE if noise.random() < 0.5 else 0
            handle.zero(length, offset, fua | hole)
            self.model[offset : offset + length] = bytes(length)
        elif kind < 0.8:
            handle.trim(length, offset, fua)
            # What it holds now is the server's choice, made once.
            self.model[offset : offset + length] = handle.pread(length, offset)
        elif kind < 0.85:
            handle.flush()
        else:
            self._verify(handle, offset, length)

    def _verify(self, handle: nbd.NBD, offset: int, length: int) -> None:
        found = bytes(handle.pread(length, offset))
        assert found == self.model[offset : offset + length], f"{length} bytes at {offset}"


# QMP

Message = dict[str, Any]


class Refused(Exception):
    """The server answered a command with an error."""

    def __init__(self, error: dict[str, str]) -> None:
        super().__init__(error["desc"])
        self.error_class = error["class"]


class Qmp:
    """A blocking QMP client. `log` has every message of the server in the order of arrival."""

    def __init__(self, path: Path | str, *, timeout_s: float = WAIT_S_MAX) -> None:
        self.timeout_s = timeout_s
        self.log: list[Message] = []
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout_s)
        self._received = b""
        self._ids = itertools.count(1)
        self._heard = 0
        try:
            self.socket.connect(os.fspath(path))
            self.greeting = self._read()
            self.log.clear()
            self.execute("qmp_capabilities")
        except BaseException:
            self.socket.close()
            raise

    def execute(self, command: str, **arguments: Any) -> Any:
        """'_' in an argument's name stands for '-'. Raises Refused."""
        number = next(self._ids)
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = {"execute": command, "arguments": named, "id": number}
        self.socket.sendall(json.dumps(message).encode())
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise Refused(answer["error"])
                return answer["return"]

    def refusal(self, command: str, **arguments: Any) -> str:
        """The error's text; the command must fail."""
        try:
            value = self.execute(command, **arguments)
        except Refused as error:
            return str(error)
        raise AssertionError(f"{command} was not refused: {value}")

    @property
    def events(self) -> list[Message]:
        """All events so far, in order."""
        return [message for message in self.log if "event" in message]

    def wait_for_event(
        self, name: str, timeout_s: float = WAIT_S_MAX, **fields: Any
    ) -> dict[str, Any]:
        """The data of the next event of that name with those fields, after the one found before."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            while self._heard < len(self.log):
                message = self.log[self._heard]
                self._heard += 1
                data = message.get("data", {})
                if message.get("event") == name and fields.items() <= data.items():
                    return dict(data)
            self._read(deadline_s, f"{name} {fields or ''}")

    def steps(self, job: str) -> list[str]:
        """What was told of a job, in order: statuses, events' names, and "return" for each answer
        to a command. X_NBDMIRROR_... events are left out."""
        found = []
        for message in self.log:
            data = message.get("data", {})
            if "return" in message:
                found.append("return")
            elif job in (data.get("id"), data.get("device")):
                is_status = message["event"] == "JOB_STATUS_CHANGE"
                found.append(data["status"] if is_status else message["event"])
        return [step for step in found if not step.startswith("X_NBDMIRROR_")]

    def forget(self) -> None:
        """Start an empty log."""
        self.log.clear()
        self._heard = 0

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Mirrors

    def add_target(self, name: str, target: Server, export: str = "") -> None:
        """blockdev-add of an export on a Unix socket."""
        server = {"type": "unix", "path": str(target.socket)}
        self.execute("blockdev-add", driver="nbd", node_name=name, server=server, export=export)

    def start_mirror(self, target: str, *, device: str = "disk0", **options: Any) -> None:
        """`target`: a node's name, or a URI. The job is "j" unless told otherwise."""
        options = {"job_id": "j", "sync": "full"} | options
        if "://" in target:
            self.execute("drive-mirror", device=device, target=target, mode="existing", **options)
        else:
            self.execute("blockdev-mirror", device=device, target=target, **options)

    def wait_ready(self, job: str = "j") -> dict[str, Any]:
        return self.wait_for_event("BLOCK_JOB_READY", device=job)

    def wait_completed(self, job: str = "j") -> dict[str, Any]:
        """Until the job has ended, well."""
        data = self.wait_for_event("BLOCK_JOB_COMPLETED", device=job)
        assert "error" not in data, data
        return data

    def complete(self, job: str = "j") -> dict[str, Any]:
        self.execute("block-job-complete", device=job)
        return self.wait_completed(job)

    def wait_status(self, status: str, job: str = "j") -> None:
        self.wait_for_event("JOB_STATUS_CHANGE", id=job, status=status)

    def job(self, job: str = "j") -> dict[str, Any]:
        """The job as query-block-jobs has it."""
        return next(j for j in self.execute("query-block-jobs") if j["device"] == job)

    def _read(self, deadline_s: float = 0.0, what: str = "an answer") -> Message:
        """One message, which goes into the log."""
        deadline_s = deadline_s or time.monotonic() + self.timeout_s
        while b"\n" not in self._received:
            left_s = deadline_s - time.monotonic()
            readable = left_s > 0 and select.select([self.socket], [], [], left_s)[0]
            assert readable, f"no {what} in time; heard: {self.log[-12:]}"
            received = self.socket.recv(1 << 16)
            if not received:
                raise ConnectionResetError("the QMP server closed the connection")
            self._received += received
        line, self._received = self._received.split(b"\n", 1)
        message: Message = json.loads(line)
        self.log.append(message)
        return message


# Servers

Finished = subprocess.CompletedProcess[str]


class Server:
    """A server process of ours. Unstarted until `start` or `with`, which returns when it serves."""

    name = "server"
    unwanted = ""
    """A regular expression: no line of its stderr may match it."""
    inside: tuple[str, ...] = ()
    """A command that runs it somewhere else: in a network namespace, say."""
    layer = 0
    """Of several, those of a higher layer are clients of a lower one's: they are stopped first."""

    def __init__(self, folder: Path) -> None:
        self.number = next(_numbers)
        self.folder = folder
        self.socket = folder / f"{self.name}{self.number}.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.allowed: list[str] = []
        """Regular expressions of stderr lines that this test provokes."""
        self._stderr_path = folder / f"{self.name}{self.number}.stderr"

    def argv(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def uri(self, export: str = "") -> str:
        return f"nbd+unix:///{export}?socket={self.socket}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def stderr(self) -> str:
        return self._stderr_path.read_text(errors="replace")

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process; `wait_ready` waits for it."""
        with self._stderr_path.open("ab") as stderr:
            self.process = subprocess.Popen(
                [*self.inside, *self.argv()],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        return self.process

    def start(self) -> Self:
        self.spawn()
        try:
            wait_until(self._look, f"{self.name} is ready", START_S_MAX)
        except BaseException:
            self.kill()
            raise
        return self

    def is_ready(self) -> bool:
        with contextlib.suppress(nbd.Error), connected(self.uri()):
            return True
        return False

    def _look(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.name} did not start: {self.stderr}"
        return self.is_ready()

    def stop(self) -> None:
        """End it in order; it must have nothing to complain of."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} does not end: {self.stderr}") from None
        self.process = None
        self.check_end(code)

    def check_end(self, code: int) -> None:
        assert code == 0, f"{self.name} ended with {code}: {self.stderr}"
        if self.unwanted:
            bad = [
                line
                for line in self.stderr.splitlines()
                if re.search(self.unwanted, line)
                and not any(re.search(pattern, line) for pattern in self.allowed)
            ]
            assert not bad, f"{self.name} said: {self.stderr}"

    def kill(self) -> None:
        """End it now, whatever it does; no questions asked."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_S_MAX)
            self.process = None

    def abandon(self) -> None:
        """The test has failed: kill it, and show what it said."""
        self.kill()
        if self._stderr_path.exists():
            sys.stderr.write(f"--- {self.name}{self.number}\n{self.stderr[-5000:]}")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.stop()
        else:
            self.abandon()


class Nbdmirror(Server):
    """The server under test, in the foreground. `bare`: nbdkit with the plugin, without the CLI.

    `disks` are paths, URIs, or NAME=... of those; `options` are the CLI's (or, if bare, plugin
    parameters); `nbdkit` are nbdkit's own options.
    """

    name = "nbdmirror"
    layer = 1
    unwanted = r"Traceback|ERROR|CRITICAL|error:|[Ee]xception"

    def __init__(
        self,
        folder: Path,
        *disks: Path | str,
        bare: bool = False,
        tcp: bool = False,
        options: tuple[str, ...] = (),
        nbdkit: tuple[str, ...] = (),
    ) -> None:
        super().__init__(folder)
        self.disks = [str(disk) for disk in disks]
        self.bare = bare
        self.port = free_port() if tcp else 0
        self.options = options
        self.nbdkit = nbdkit
        self.qmp_path = folder / f"qmp{self.number}"
        self._qmp: Qmp | None = None

    def argv(self) -> list[str]:
        if self.bare:
            listen = ["-i", "127.0.0.1", "-p", str(self.port)] if self.port else ["-U", self.socket]
            disks = [f"file={disk}" for disk in self.disks]
            nbdkit = ["nbdkit", "-f", *map(str, listen), *self.nbdkit]
            return [*nbdkit, "python", str(PLUGIN), *disks, f"qmp={self.qmp_path}", *self.options]
        listen = ["--port", str(self.port)] if self.port else ["--socket", str(self.socket)]
        extra = ["--", *self.nbdkit] if self.nbdkit else []
        serve = [sys.executable, "-m", "nbdmirror", "serve", *self.disks, *map(str, listen)]
        return [*serve, "--qmp", str(self.qmp_path), *self.options, *extra]

    def environment(self) -> dict[str, str]:
        return nbdmirror_environment()

    def uri(self, export: str = "") -> str:
        return f"nbd://127.0.0.1:{self.port}/{export}" if self.port else super().uri(export)

    def is_ready(self) -> bool:
        """nbdkit answers, and so does the control endpoint."""
        if not super().is_ready():
            return False
        with Qmp(self.qmp_path):
            return True

    @property
    def qmp(self) -> Qmp:
        """A client of its control socket, made when first asked for."""
        if self._qmp is None:
            self._qmp = Qmp(self.qmp_path)
        return self._qmp

    def stop(self) -> None:
        was_running = self.process is not None
        try:
            super().stop()
        finally:
            self._close_qmp()
        if was_running:
            assert not self.qmp_path.exists(), "the control socket was left behind"

    def kill(self) -> None:
        super().kill()
        self._close_qmp()

    def _close_qmp(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None


class QemuNbd(Server):
    """qemu-nbd of an image file."""

    name = "qemu-nbd"

    def __init__(
        self,
        folder: Path,
        image: Path,
        fmt: str = "raw",
        *,
        shared: int = 16,
        read_only: bool = False,
        export: str = "",
        options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(folder)
        self.image = image
        self.export = export
        self.options = [f"--shared={shared}", *(["--read-only"] if read_only else []), *options]
        self.fmt = fmt

    def argv(self) -> list[str]:
        fixed = ["--persistent", "--discard=unmap", f"--socket={self.socket}"]
        names = [f"--export-name={self.export}", f"--format={self.fmt}"]
        return ["qemu-nbd", *fixed, *names, *self.options, str(self.image)]

    def uri(self, export: str | None = None) -> str:
        return super().uri(self.export if export is None else export)


class NbdkitTarget(Server):
    """nbdkit with a plugin and filters: NbdkitTarget(folder, "memory", "1M",
    filters=("delay",))."""

    name = "nbdkit"

    def __init__(
        self,
        folder: Path,
        plugin: str,
        *parameters: str,
        filters: tuple[str, ...] = (),
        options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(folder)
        self.plugin = plugin
        self.parameters = parameters
        self.options = [*(f"--filter={name}" for name in filters), *options]

    def argv(self) -> list[str]:
        return [
            "nbdkit", "-f", "-U", str(self.socket), *self.options, self.plugin, *self.parameters,
        ]  # fmt: skip


class QsdTarget(Server):
    """qemu-storage-daemon with one writable export."""

    name = "qsd"

    def __init__(self, folder: Path, image: Path, fmt: str = "raw") -> None:
        super().__init__(folder)
        self.image = image
        self.fmt = fmt

    def argv(self) -> list[str]:
        file = f"driver=file,node-name=file0,filename={self.image},discard=unmap"
        return [
            "qemu-storage-daemon",
            "--blockdev", file,
            "--blockdev", f"driver={self.fmt},node-name=disk,file=file0,discard=unmap",
            "--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=16",
            "--export", "type=nbd,id=export0,node-name=disk,name=disk,writable=on",
        ]  # fmt: skip

    def uri(self, export: str = "disk") -> str:
        return super().uri(export)


def nbdmirror_environment() -> dict[str, str]:
    """For the CLI, and for nbdkit's interpreter, which knows no virtual environment."""
    environ = {k: v for k, v in os.environ.items() if k != "NBDMIRROR_QMP"}
    places = [str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return {**environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(places))}


def patched(environment: dict[str, str], folder: Path, code: str) -> dict[str, str]:
    """`environment` for a server whose interpreter runs `code` first: it finds a sitecustomize of
    ours."""
    place = folder / "patched"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(code)
    return environment | {"PYTHONPATH": f"{place}{os.pathsep}{environment['PYTHONPATH']}"}


def nbdmirror(*arguments: str | Path, timeout_s: float = WAIT_S_MAX) -> Finished:
    """Run a command of the CLI to its end."""
    return run(sys.executable, "-m", "nbdmirror", *arguments, timeout_s=timeout_s, check=False)


def run(*command: str | Path, timeout_s: float = WAIT_S_MAX, check: bool = True) -> Finished:
    """Run a tool to its end; if `check`, it must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        env=nbdmirror_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"{' '.join(done.args)}: {done.stdout}{done.stderr}"
    return done
