"""`nbdmirror explain` with real servers that are slow on purpose: the cause is named, its share is
right, and the same sentences are in every place."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import KiB, MiB, make_image, make_noise
from support.paritysides import Faulty
from support.processes import Finished, freeze, nbdmirror
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd
from support.waiting import WAIT_S_MAX, wait_until

from nbdmirror.cli.common import DONE, FAILED, NO_SERVER, TIMED_OUT, USAGE

SIZE = 4 * MiB
ONE_BY_ONE = {"granularity": 64 * KiB, "buf_size": 64 * KiB}


@pytest.fixture
def server(start: Start, disk: Path) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, f"vda={disk}"))


def delayed(start: Start, folder: Path, *delays: str) -> NbdkitTarget:
    """A target with nbdkit's delay filter."""
    image = make_image(folder / "delayed.img", SIZE)
    return start(NbdkitTarget(folder, "file", str(image), *delays, filters=("delay",)))


def begin(server: Nbdmirror, uri: str, **options: Any) -> None:
    arguments = {"device": "vda", "target": uri, "mode": "existing", "sync": "full"}
    server.qmp.execute("drive-mirror", **arguments, **options)


def job_of(server: Nbdmirror) -> dict[str, Any]:
    (disk,) = server.qmp.execute("x-nbdmirror-query-status")["disks"]
    (job,) = disk["jobs"]
    return dict(job)


def shares(server: Nbdmirror) -> dict[str, float]:
    found: dict[str, float] = job_of(server)["waits"]["since-start"]
    assert sum(found.values()) == pytest.approx(1)
    return found


def command(server: Nbdmirror, *arguments: str) -> Finished:
    done = nbdmirror(*arguments, "--qmp", server.qmp_path)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def explained(server: Nbdmirror) -> str:
    found = command(server, "explain")
    assert found.returncode == DONE
    return str(found.stdout)


def wait_to_explain(server: Nbdmirror, words: str, timeout_s: float = WAIT_S_MAX) -> str:
    """What is explained, once it has these words. Each command is a process, so the server is asked
    first."""

    def found() -> str:
        is_told = any(words in sentence for sentence in job_of(server)["explanation"])
        return text if is_told and words in (text := explained(server)) else ""

    return str(wait_until(found, f"it is told: {words}", timeout_s))


def check_everywhere(server: Nbdmirror, words: str) -> None:
    """In explain and in status, for people and for programs."""
    (job,) = json.loads(command(server, "explain", "--json").stdout)
    assert any(words in sentence for sentence in job["explanation"])
    (disk,) = json.loads(command(server, "status", "--json").stdout)["disks"]
    assert any(words in sentence for sentence in disk["jobs"][0]["explanation"])
    assert words in command(server, "status").stdout
    assert words in explained(server)


def check_slow(server: Nbdmirror, cause: str, words: str) -> None:
    """`cause` is named before its silence is; its share grows as long as it lasts."""

    def waiting() -> dict[str, Any]:
        job = job_of(server)
        return job if job["waits"]["seconds"][cause] > 1.8 else {}

    assert words in wait_until(waiting, "it copies")["explanation"][0]
    wait_until(lambda: shares(server)[cause] > 0.9, "its share is right")


@pytest.mark.parametrize("is_hole", [False, True])
def test_a_slow_target(start: Start, folder: Path, is_hole: bool) -> None:
    """For data, and for zeroes."""
    disk = make_image(folder / "d.img", SIZE) if is_hole else make_noise(folder / "d.img", SIZE)
    server = start(Nbdmirror(folder, f"vda={disk}"))
    target = delayed(start, folder, "delay-zero=20" if is_hole else "wdelay=300ms")
    begin(server, target.uri(), **ONE_BY_ONE)
    check_slow(server, "target-write", "waits for the target to write")


def test_a_slow_write_is_named_everywhere(start: Start, folder: Path, server: Nbdmirror) -> None:
    target = delayed(start, folder, "wdelay=1")
    begin(server, target.uri(), **ONE_BY_ONE)
    wait_until(lambda: job_of(server)["copied-bytes"] > 0, "it copies")
    wait_until(lambda: shares(server)["target-write"] > 0.9, "its share is right")
    check_everywhere(server, "waits for the target to write (")
    assert "target write 9" in explained(server) or "target write 100 %" in explained(server)


def test_a_slow_source(start: Start, folder: Path, target: QemuNbd) -> None:
    image = make_noise(folder / "source.img", SIZE)
    delays = ("rdelay=300ms",)
    source = start(NbdkitTarget(folder, "file", str(image), *delays, filters=("delay",)))
    server = start(Nbdmirror(folder, f"vda={source.uri()}"))
    begin(server, target.uri(), **ONE_BY_ONE)
    check_slow(server, "source-read", "waits for the source to read")


def test_a_slow_flush(
    start: Start, folder: Path, disk: Path, server: Nbdmirror, identical: Identical
) -> None:
    target = start(Faulty(folder, make_image(folder / "slow.img", SIZE)))
    target.set("flush", "hold")
    begin(server, target.uri())

    def flushing() -> dict[str, Any]:
        job = job_of(server)
        found = job["waits"]["seconds"]
        is_long = found["target-flush"] > max(0.59, found["target-write"])
        return job if is_long and job["waits"]["now"] == "target-flush" else {}

    job = wait_until(flushing, "it waits for the flush for long")
    assert "waits for the target to flush" in job["explanation"][0]
    target.heal("flush")
    server.qmp.wait_ready("vda")
    server.qmp.execute("job-complete", id="vda")
    wait_until(lambda: "pivoted" in server.stderr, "it ends")
    identical(disk, target.image)


SLOW_FLUSH = """
import os, time
fd = os.open({image!r}, os.O_RDWR)
open = lambda readonly: 0
get_size = lambda h: os.fstat(fd).st_size
pread = lambda h, count, offset: os.pread(fd, count, offset)
pwrite = lambda h, buf, offset: os.pwrite(fd, buf, offset)
flush = lambda h: time.sleep(0.6)
"""
"""A plugin of nbdkit's: its delay filter does not delay flushes."""


def test_a_pivot_that_may_not_hold_guests_for_so_long(
    start: Start, folder: Path, disk: Path, server: Nbdmirror, identical: Identical
) -> None:
    """It waits, and holds nobody, until more is allowed."""
    image = make_image(folder / "slow.img", SIZE)
    script = folder / "slow.py"
    script.write_text(SLOW_FLUSH.format(image=str(image)))
    target = start(NbdkitTarget(folder, "python", str(script)))
    refused = command(server, "mirror", target.uri(), "--max-pause", "10001")
    assert refused.returncode == USAGE and "from 0 to 10000" in refused.stderr
    begun = command(server, "mirror", target.uri(), "--max-pause", "100", "--wait", "ready")
    assert begun.returncode == DONE
    check_everywhere(server, "and 100 ms are allowed: a pivot would wait for a better moment")
    server.qmp.execute("job-complete", id="vda")
    wait_to_explain(server, "the pivot waits")
    assert (job_of(server)["max-pause-ms"], job_of(server)["quiesce-timeouts"]) == (100.0, 0)
    with connected(server.uri("vda")) as guest:
        guest.pwrite(b"x" * 512, 0)
    changed = command(server, "change", "--max-pause", "5000")
    text = "job vda holds guests' writes for 5000 ms at most at its pivot; for its end it may do"
    assert changed.stdout == f"{text}: nothing\n"
    wait_until(lambda: "pivoted" in server.stderr, "it ends")
    (disk_status,) = server.qmp.execute("x-nbdmirror-query-status")["disks"]
    assert 100 < disk_status["last-job"]["pause-ms"] <= 5000
    identical(disk, image)


def test_a_speed_limit(server: Nbdmirror, target: QemuNbd) -> None:
    begin(server, target.uri(), speed=64 * KiB, **ONE_BY_ONE)
    wait_until(lambda: job_of(server)["waits"]["seconds"]["speed-limit"] > 1, "it is held back")
    wait_until(lambda: shares(server)["speed-limit"] > 0.9, "its share is right")
    check_everywhere(server, "waits for its speed limit of 64 KiB/s")


def test_states_of_a_job(
    start: Start, server: Nbdmirror, disk: Path, target: QemuNbd, identical: Identical
) -> None:
    """From none to none."""
    assert explained(server) == "disk vda has no job\n"
    arguments = {"device": "vda", "target": target.uri(), "mode": "existing", "sync": "full"}
    server.qmp.execute("drive-mirror", **arguments, x_nbdmirror_reconnect_delay=60)
    server.qmp.wait_ready("vda")
    check_everywhere(server, "the target follows the source, and the job can be completed")
    server.qmp.execute("job-pause", id="vda")
    server.qmp.wait_status("standby", "vda")
    check_everywhere(server, "copies nothing while it is paused; continue with: nbdmirror resume")
    wait_until(lambda: job_of(server)["waits"]["seconds"]["paused"] > 0.1, "it is paused")
    server.qmp.execute("job-resume", id="vda")
    server.allowed = ["lost", "connect"]
    target.kill()
    server.qmp.wait_for_event("X_NBDMIRROR_TARGET_LOST")
    check_everywhere(server, "the target has been lost for 0:")
    wait_until(lambda: job_of(server)["waits"]["now"] == "reconnecting", "it knows")
    target.start()
    server.qmp.wait_for_event("X_NBDMIRROR_TARGET_BACK")
    freeze(target.pid)
    with connected(server.uri("vda")) as guest:
        guest.pwrite(b"x" * 512, 0)
    wait_until(lambda: job_of(server)["waits"]["now"] == "target-write", "the target hangs")
    wait_to_explain(server, "the target has not answered")
    os.kill(target.pid, signal.SIGCONT)
    server.qmp.execute("job-complete", id="vda")
    wait_until(lambda: "has no job" in explained(server), "it ends")
    assert "disk vda has no job; the last job vda: completed" in explained(server)
    identical(disk, target.image)


def test_an_error_that_stops_a_job(start: Start, folder: Path, server: Nbdmirror) -> None:
    server.allowed = ["write error"]
    image = make_image(folder / "full.img", SIZE)
    error = ("error=ENOSPC", "error-pwrite-rate=100%")
    full = start(NbdkitTarget(folder, "file", str(image), *error, filters=("error",)))
    begin(server, full.uri(), on_target_error="stop")
    server.qmp.wait_status("paused", "vda")
    wait_until(lambda: job_of(server)["waits"]["seconds"]["error"] > 0.2, "time passes")
    assert job_of(server)["waits"]["now"] == "error"
    check_everywhere(server, "No space left on device; try again with: nbdmirror resume")


def test_a_job_that_waits_for_a_user(server: Nbdmirror, target: QemuNbd) -> None:
    arguments = {"device": "vda", "target": target.uri(), "mode": "existing", "sync": "full"}
    server.qmp.execute("drive-mirror", **arguments, auto_finalize=False, auto_dismiss=False)
    server.qmp.wait_ready("vda")
    server.qmp.execute("job-complete", id="vda")
    server.qmp.wait_status("pending", "vda")
    check_everywhere(server, "has finished its work; end the job with: nbdmirror finalize")
    server.qmp.execute("job-finalize", id="vda")
    server.qmp.wait_status("concluded", "vda")
    check_everywhere(server, "has ended; remove the job with: nbdmirror dismiss")


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """A guest that writes everywhere, again and again, as fast as it can."""
    stop = threading.Event()

    def work() -> None:
        with connected(uri) as guest:
            number = 0
            while not stop.is_set():
                guest.pwrite(bytes([1 + number % 250]) * MiB, number % 32 * MiB)
                number += 1
                stop.wait(0.02)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_guest_that_is_too_fast_for_the_target(
    start: Start, folder: Path, identical: Identical
) -> None:
    """That is told, with the rates and with what to do, and what to do helps."""
    disk, image = make_noise(folder / "big.img", 32 * MiB), make_image(folder / "t.img", 32 * MiB)
    server = start(Nbdmirror(folder, f"vda={disk}"))
    slow = start(NbdkitTarget(folder, "file", str(image), "rate=40M", filters=("rate",)))
    begin(server, slow.uri())
    with writing(server.uri("vda")):
        # Until the guest was everywhere once, it changes more than is copied.
        said = wait_to_explain(server, "the guest changes as much of that again", 90)
        assert "the target takes" in said and "the mirror does not finish" in said
        assert "nbdmirror copy-mode write-blocking" in said
        assert "in sync in" not in said
        assert command(server, "copy-mode", "write-blocking").returncode == DONE
        server.qmp.wait_ready("vda")
    server.qmp.execute("job-complete", id="vda")
    wait_until(lambda: "pivoted" in server.stderr, "it ends")
    identical(disk, image)


def test_several_disks(start: Start, folder: Path, target: QemuNbd) -> None:
    disks = [f"{name}={make_noise(folder / f'{name}.img', SIZE)}" for name in ("vda", "vdb", "vdc")]
    server = start(Nbdmirror(folder, *disks))
    other = start(QemuNbd(folder, make_image(folder / "other.img", SIZE)))
    for name, uri in (("vda", target.uri()), ("vdb", other.uri())):
        arguments = {"device": name, "target": uri, "mode": "existing", "sync": "full"}
        server.qmp.execute("drive-mirror", **arguments)
        server.qmp.wait_ready(name)
    said = explained(server)
    assert [line for line in said.splitlines() if line[0] != " "] == [
        f"job vda: ready, 100.0%, disk vda to {target.uri()}",
        f"job vdb: ready, 100.0%, disk vdb to {other.uri()}",
        "disk vdc has no job",
    ]
    assert len(json.loads(command(server, "explain", "--json").stdout)) == 2
    for option in (["--device", "vdb"], ["--job", "vdb"]):
        chosen = command(server, "explain", *option)
        assert chosen.returncode == DONE
        assert "job vdb" in chosen.stdout and "vda" not in chosen.stdout
    for option, text in (
        (["--device", "vdc"], "disk vdc has no job"),
        (["--device", "x"], "there is no disk x; the server's disks are: vda, vdb, vdc"),
        (["--job", "x"], "there is no job x; the jobs are: vda, vdb"),
    ):
        refused = command(server, "explain", *option)
        assert (refused.returncode, refused.stdout) == (FAILED, "")
        assert text in refused.stderr


def test_a_server_that_does_not_answer(server: Nbdmirror) -> None:
    freeze(server.pid)
    found = command(server, "explain")
    assert (found.returncode in (NO_SERVER, TIMED_OUT), found.stdout) == (True, "")
    os.kill(server.pid, signal.SIGCONT)
    server.stop()
    found = command(server, "explain")
    assert (found.returncode, found.stdout) == (NO_SERVER, "")
    assert "no server at" in found.stderr


def test_help_names_it() -> None:
    assert "explain what a job waits for" in nbdmirror("explain", "--help").stdout
