"""`./run demo`: a disk with a file system on it is mirrored and moved while a client writes to it.

    fio --(NBD)--> nbdmirror serve --> source.img
                        '--(NBD, the mirror)--> qemu-nbd --> target.img

The image is an ext4 file system and, behind it, an area that fio writes to and verifies all the
while, over one connection. The mirror is started, gets ready and is completed; from then on that
same connection is served from the target. At the end everything is compared. Takes about
fifteen seconds and 700 MiB of temporary files; ends with status 1 and one line if anything
differs. With --web a page in the browser shows it at work, for three times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KiB, MiB = 1 << 10, 1 << 20
FILE_SYSTEM_BYTES = 232 * MiB
SCRATCH_BYTES = 24 * MiB
DISK_BYTES = FILE_SYSTEM_BYTES + SCRATCH_BYTES
FILES_BYTES = 96 * MiB
ROOM_BYTES = 768 * MiB
FOLDER_LENGTH_MAX = 90
"""A Unix socket's name may have 107 bytes."""

FIO_BYTES_PER_S = 12 * MiB
FIO_ROUNDS = 5
"""Each writes the whole area once and verifies it: ten seconds together. The mirror needs a third
of that, so that the pivot comes in the middle."""
MIRROR_RATE = "96M"
"""Slow enough to see it at work."""
SLOWER = 3
"""With a page everything but the mirror takes so many times as long."""

WAIT_S_MAX = 20.0
FIO_S_MAX = 60.0
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]),
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}
QUIET: dict[str, Any] = {"env": ENVIRONMENT, "stdin": subprocess.DEVNULL}


class DemoError(Exception):
    """Something differs, or did not work; the text is one line that says what."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="run demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--web", action="store_true", help="serve a page that shows it at work")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        with contextlib.ExitStack() as stack:
            demonstrate(stack, with_page=args.web)
    except DemoError as error:
        say(f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0


def demonstrate(stack: contextlib.ExitStack, *, with_page: bool) -> None:
    slower = SLOWER if with_page else 1
    folder = Path(tempfile.mkdtemp(prefix="nbdmirror-demo-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    check(
        shutil.disk_usage(folder).free >= ROOM_BYTES and len(str(folder)) <= FOLDER_LENGTH_MAX,
        f"{folder.parent} has not {mib(ROOM_BYTES)} to spare, or too long a name for sockets:"
        " name another folder in TMPDIR",
    )
    os.chdir(folder)
    ENVIRONMENT["NBDMIRROR_QMP"] = "control.qmp"

    say("a disk with an ext4 file system, and a target of the same size that holds old data")
    make_files(Path("files"))
    tool("mke2fs", "-q", "-F", "-t", "ext4", "-d", "files", "source.img", mib(FILE_SYSTEM_BYTES))
    os.truncate("source.img", DISK_BYTES)
    make_noise(Path("target.img"), DISK_BYTES)

    say("two NBD servers: nbdmirror serves the disk, qemu-nbd is the target")
    server = stack.enter_context(
        running("nbdmirror", "serve", "source.img", "--socket", "disk.sock", until="control.qmp")
    )
    target = stack.enter_context(
        running("qemu-nbd", "-t", "-f", "raw", "-k", here("target.sock"), "target.img",
                until="target.sock")
    )  # fmt: skip

    if with_page:
        say(f"a page that shows it, in a browser: {stack.enter_context(page())}")
    say("a client: fio writes at random places behind the file system, and verifies")
    fio = stack.enter_context(running(*fio_command(FIO_ROUNDS * slower)))
    events = stack.enter_context(running("nbdmirror", "events", "--json"))
    sleep_while(fio, 1.0 * slower)

    say("the mirror")
    uri = f"nbd+unix:///?socket={here('target.sock')}"
    nbdmirror("mirror", uri, "--speed", MIRROR_RATE, "--wait", "ready")
    nbdmirror("status")
    written = status()["written-bytes"]
    sleep_while(fio, 1.0 * slower)

    say("the pivot")
    nbdmirror("complete")
    source_at_pivot = digest(Path("source.img"))
    source = nbdmirror("status").splitlines()[0].split()[-1]
    check(source == uri, f"after the pivot the disk is served from {source}")
    check(fio.poll() is None, "fio ended before the pivot: this machine is too busy for a demo")

    say("the client goes on; its last round of writes is verified to the end")
    results = fio_results(fio, FIO_ROUNDS * slower)
    stop(server)
    stop(target)
    events.wait(WAIT_S_MAX)
    check_images(source_at_pivot)
    report(results, written)
    if not with_page:
        say("to look at it while it runs, in a browser: ./run demo --web")


# What is on the disk


def make_files(folder: Path) -> None:
    """Files of many sizes in a few directories, one of them sparse."""
    noise = random.Random(1)
    left, number = FILES_BYTES, 0
    while left > 0:
        size = min(left, noise.choice((1, 4000, 70_000, 1 << 20, 5_000_001)))
        path = folder / f"directory{number % 7}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise.randbytes(size))
        left -= size
        number += 1
    with (folder / "sparse").open("wb") as sparse:
        sparse.seek(20 * MiB)
        sparse.write(b"the end")


def make_noise(path: Path, size: int) -> None:
    noise = random.Random(2).randbytes(MiB)
    with path.open("wb") as file:
        for _ in range(size // MiB):
            file.write(noise)


def digest(path: Path, offset: int = 0, length: int | None = None) -> str:
    """SHA-256 of a file's range; to its end if no length is given."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        left = path.stat().st_size - offset if length is None else length
        while left > 0 and (block := file.read(min(MiB, left))):
            found.update(block)
            left -= len(block)
    return found.hexdigest()


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): digest(path) for path in files}


def check_images(source_at_pivot: str) -> None:
    source, target = Path("source.img"), Path("target.img")
    size = target.stat().st_size
    check(size == DISK_BYTES, f"the target has {size} bytes, not {DISK_BYTES}")
    check(
        digest(source, 0, FILE_SYSTEM_BYTES) == digest(target, 0, FILE_SYSTEM_BYTES),
        "the file systems of source and target differ",
    )
    tool("e2fsck", "-f", "-n", "target.img")
    Path("found").mkdir()
    tool("debugfs", "-R", "rdump / found", "target.img")
    shutil.rmtree("found/lost+found", ignore_errors=True)
    there, expected = digests(Path("found")), digests(Path("files"))
    check(there == expected, "the files on the target are not those that were put on the source")
    say(f"e2fsck finds nothing wrong with the target; its {len(there)} files are the source's")
    check(digest(source) == source_at_pivot, "the source was written to after the pivot")
    check(
        digest(source, FILE_SYSTEM_BYTES) != digest(target, FILE_SYSTEM_BYTES),
        "what the client wrote after the pivot is not on the target",
    )
    say("what the client wrote after the pivot is on the target, and not on the source")


# The client


def fio_command(rounds: int) -> list[str]:
    return [
        "fio", "--name=client", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={here('disk.sock')}",
        "--rw=randwrite", "--bs=16k", "--iodepth=8", f"--rate=,{FIO_BYTES_PER_S}",
        f"--offset={FILE_SYSTEM_BYTES}", f"--size={SCRATCH_BYTES}", f"--loops={rounds}",
        "--verify=crc32c", "--verify_fatal=1", "--end_fsync=1",
        "--output-format=json", "--output=fio.json",
    ]  # fmt: skip


def fio_results(fio: subprocess.Popen[bytes], rounds: int) -> dict[str, Any]:
    try:
        status = fio.wait(FIO_S_MAX)
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"fio did not end within {FIO_S_MAX:g} s") from error
    check(status == 0, f"fio ended with status {status}: {last_line(Path('fio.log'))}")
    text = Path("fio.json").read_text()
    results: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    check(results["error"] == 0, f"fio had error {results['error']}")
    written, expected = results["write"]["io_bytes"], rounds * SCRATCH_BYTES
    check(written == expected, f"fio wrote {written} bytes, not {expected}")
    verified = results["read"]["io_bytes"]
    check(verified == expected, f"fio verified {verified} bytes, not {expected}")
    return results


# What happened


def status() -> dict[str, Any]:
    """Of the one job there is."""
    text = finished(*words("nbdmirror"), "status", "--json").stdout
    job: dict[str, Any] = json.loads(text)["disks"][0]["jobs"][0]
    return job


def report(results: dict[str, Any], written_bytes: int) -> None:
    heard = map(json.loads, Path("nbdmirror-events.log").read_text().splitlines())
    events = {event["event"]: event["data"] for event in heard}
    check("BLOCK_JOB_COMPLETED" in events, "no event told the end of the job")
    check("error" not in events["BLOCK_JOB_COMPLETED"], "the job ended with an error")
    copied = events["BLOCK_JOB_COMPLETED"]["offset"]
    write = results["write"]
    worst_ms = write["clat_ns"]["max"] / 1e6
    rows = {
        "copied": f"{mib(copied)} of a disk of {mib(DISK_BYTES)}: {copied / DISK_BYTES:.2f} times"
        f" over, since the client wrote on ({mib(written_bytes)} of it data, the rest zeroes)",
        "pivot": f"held the client's writes for {events['X_NBDMIRROR_PIVOTED']['pause-ms']:.1f} ms",
        "client": f"{write['total_ios']} writes over one connection, none failed, all verified;"
        f" the slowest took {worst_ms:.1f} ms",
    }
    say("all is well")
    for name, text in rows.items():
        print(f"   {name:8}{text}", flush=True)


# Processes


def words(command: str) -> list[str]:
    return [sys.executable, "-m", "nbdmirror"] if command == "nbdmirror" else [command]


def nbdmirror(*arguments: str) -> str:
    """Run, show what it prints, and return it."""
    print(f"   $ nbdmirror {shlex.join(arguments)}", flush=True)
    ended = finished(*words("nbdmirror"), *arguments, stderr=None)
    check(ended.returncode == 0, f"nbdmirror {arguments[0]} ended with status {ended.returncode}")
    for line in ended.stdout.splitlines():
        print(f"   {line}", flush=True)
    return ended.stdout


def tool(*command: str) -> None:
    ended = finished(*command)
    if ended.returncode:
        lines = (ended.stdout + ended.stderr).strip().splitlines() or ["no output"]
        raise DemoError(f"{command[0]} ended with status {ended.returncode}: {lines[-1]}")


def finished(
    *command: str, stderr: int | None = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    try:
        bounds = {**QUIET, "stdout": subprocess.PIPE, "stderr": stderr, "timeout": WAIT_S_MAX}
        return subprocess.run(command, **bounds, text=True, check=False)
    except FileNotFoundError as error:
        raise DemoError(f"{command[0]} is not installed: ./run setup") from error
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"{command[0]} did not end within {WAIT_S_MAX:g} s") from error


@contextlib.contextmanager
def running(
    command: str, *arguments: str, until: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the background; it serves when the file `until` is there. Its output goes to
    NAME.log, or NAME-COMMAND.log for nbdmirror's."""
    name = f"nbdmirror-{arguments[0]}" if command == "nbdmirror" else command
    log = Path(f"{name}.log")
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                [*words(command), *arguments], **QUIET, stdout=file, stderr=file
            )
        except FileNotFoundError as error:
            raise DemoError(f"{command} is not installed: ./run setup") from error
    try:
        if until is not None:
            wait_until(lambda: process.poll() is not None or Path(until).exists(), name)
            check(process.poll() is None, f"{name} did not start: {last_line(log)}")
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(WAIT_S_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def page() -> Iterator[str]:
    """The address of a page, which is there until the end."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with running("nbdmirror", "web", "control.qmp", "--listen", address):
        wait_until(lambda: "serving" in last_line(Path("nbdmirror-web.log")), "nbdmirror web")
        yield f"http://{address}/"


def stop(process: subprocess.Popen[bytes]) -> None:
    """In order: what it wrote is in its file then."""
    process.terminate()
    try:
        status = process.wait(WAIT_S_MAX)
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"{process.args!r} did not end within {WAIT_S_MAX:g} s") from error
    check(status == 0, f"{process.args!r} ended with status {status}")


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S_MAX
    while not is_so():
        if time.monotonic() > deadline_s:
            raise DemoError(f"{what} did not start within {WAIT_S_MAX:g} s")
        time.sleep(0.02)


def sleep_while(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Let the client write for a while."""
    time.sleep(seconds)
    check(process.poll() is None, f"fio ended early: {last_line(Path('fio.log'))}")


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def here(name: str) -> str:
    return str(Path.cwd() / name)


def mib(number: int) -> str:
    return f"{number / MiB:.0f}M"


def check(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise DemoError(otherwise)


def say(text: str) -> None:
    print(f"== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
