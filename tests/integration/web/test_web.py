"""`nbdmirror web` with real servers: several, of which one hangs and one is killed; a mirror, from
its start to its pivot."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from integration.web.webserver import Web
from prometheus_client.parser import text_string_to_metric_families as parse
from support.fixtures import Identical, Start
from support.images import MiB, make_image
from support.processes import free_port, freeze, nbdmirror, nbdmirror_environment
from support.promtool import checked
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.cli.common import DONE, FAILED, NO_SERVER, USAGE


def served(folder: Path, name: str) -> Nbdmirror:
    """An unstarted server of a disk, with its control socket in a directory of sockets."""
    server = Nbdmirror(folder, f"{name}={make_image(folder / f'{name}.img', MiB)}")
    server.qmp_path = folder / "sockets" / f"{name}.qmp"
    server.qmp_path.parent.mkdir(exist_ok=True)
    return server


def up(web: Web) -> dict[str, float]:
    """By the sockets' names, without directory and extension."""
    families = {one.name: one for one in parse(web.get("/metrics")[1])}
    return {
        Path(sample.labels["server"]).stem: sample.value
        for sample in families["nbdmirror_server_up"].samples
    }


def answered(web: Web, name: str) -> float:
    """When a server answered last."""
    families = {one.name: one for one in parse(web.get("/metrics")[1])}
    samples = families["nbdmirror_server_answer_timestamp_seconds"].samples
    return {Path(one.labels["server"]).stem: one.value for one in samples}.get(name, 0.0)


def test_three_servers_one_frozen_one_killed(folder: Path, start: Start) -> None:
    _, b, c = (start(served(folder, name)) for name in "abc")
    web = start(Web(folder, folder / "sockets"))
    wait_until(lambda: up(web) == {"a": 1, "b": 1, "c": 1}, "all are there")
    freeze(b.pid)
    c.kill()
    wait_until(lambda: up(web) == {"a": 1, "b": 0, "c": 0}, "two do not answer")
    silent = web.json("/healthz")["not-answering"]
    assert silent[str(b.qmp_path)] == "no answer within 5 s"
    assert "Connection refused" in silent[str(c.qmp_path)]
    before = answered(web, "a")
    wait_until(lambda: answered(web, "a") > before, "the third is asked on")
    os.kill(b.pid, signal.SIGCONT)
    c.start()
    wait_until(lambda: up(web) == {"a": 1, "b": 1, "c": 1}, "all are there again")
    assert len(web.json("/status")) == 3
    assert checked("check", "metrics", text=web.get("/metrics")[1]) == ""


def test_servers_come_and_go(folder: Path, start: Start) -> None:
    """In a directory, or in one below, as the systemd units have them; what else is there is left
    alone."""
    place = folder / "sockets"
    (place / "vm1").mkdir(parents=True)
    (place / "notes.qmp").write_text("no socket")
    web = start(Web(folder, place))
    assert up(web) == {}
    a, b = served(folder, "a"), served(folder, "b")
    b.qmp_path = place / "vm1" / "qmp"
    start(a)
    start(b)
    with socket.socket(socket.AF_UNIX) as other:  # guests', say
        other.bind(str(place / "nbd"))
        wait_until(lambda: up(web) == {"a": 1, "qmp": 1}, "they appear")
    a.stop()
    wait_until(lambda: up(web) == {"qmp": 1}, "one disappears")
    b.stop()
    shutil.rmtree(place)
    wait_until(lambda: up(web) == {}, "the other does too")


def test_without_sockets_it_has_the_servers_of_the_host(folder: Path, start: Start) -> None:
    """One that was killed is missed, and one that ended in order is not."""
    server = start(served(folder, "a"))
    web = start(Web(folder))
    series = f'nbdmirror_server_up{{server="{server.qmp_path}"}}'
    wait_until(lambda: f"{series} 1.0" in web.get("/metrics")[1], "it is found by its process")
    server.kill()
    wait_until(lambda: f"{series} 0.0" in web.get("/metrics")[1], "it is missed")
    server.start()
    wait_until(lambda: f"{series} 1.0" in web.get("/metrics")[1], "it is there again")
    server.stop()
    wait_until(lambda: str(server.qmp_path) not in web.get("/metrics")[1], "it is gone")


def test_a_mirror(
    folder: Path, start: Start, identical: Identical, disk: Path, target: QemuNbd
) -> None:
    """Its numbers are those of `status --json`, and a disk is protected while it is ready."""
    server = start(Nbdmirror(folder, disk))
    web = start(Web(folder, server.qmp_path))
    series = f'{{disk="disk0",server="{server.qmp_path}"}}'
    protected = f"nbdmirror_disk_protected{series}"
    wait_until(lambda: f"{protected} 0.0" in web.get("/metrics")[1], "no mirror yet")
    (found,) = web.json("/status")
    assert found.pop("age-s") >= 0
    answer = server.qmp.execute("x-nbdmirror-query-status")
    assert found == {"qmp": str(server.qmp_path), **answer}
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    wait_until(lambda: f"{protected} 1.0" in web.get("/metrics")[1], "it is protected")
    assert checked("check", "metrics", text=web.get("/metrics")[1]) == ""
    server.qmp.complete()
    ended = 'nbdmirror_disk_last_job_result{disk="disk0",result="completed"'
    wait_until(lambda: ended in web.get("/metrics")[1], "its end is there")
    identical(disk, target.image)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_once_with_clients(folder: Path, start: Start, number: signal.Signals) -> None:
    server = start(served(folder, "a"))
    web = start(Web(folder, server.qmp_path))
    with socket.create_connection(("127.0.0.1", web.port)) as silent:
        silent.sendall(b"GET /met")
        freeze(server.pid)
        os.kill(web.pid, number)
        assert web.process is not None
        assert web.process.wait(10) == DONE
    os.kill(server.pid, signal.SIGCONT)
    assert len(web.stderr.splitlines()) == 1


def test_in_a_scripts_background_it_is_not_ended_by_ctrl_c(folder: Path, start: Start) -> None:
    """What was ignored at the start stays ignored; SIGTERM ends it, as the fixture does."""
    web = Web(folder, folder / "none.qmp")
    web.inside = ("sh", "-c", 'trap "" INT HUP; exec "$@"', "sh")
    start(web)
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(web.pid, number)
        for _ in range(10):
            assert web.get("/healthz")[0] in (200, 503)
    assert web.process is not None
    assert web.process.poll() is None


# Bad input


def test_what_is_no_address() -> None:
    for address in (
        "localhost", ":80", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:-1",
        "127.0.0.1:\uff18", "::1:80", "[::1]80", "http://localhost:80", "localhost:80/", "a b:80",
        "/run/web.sock", "[localhost:80",
    ):  # fmt: skip
        done = nbdmirror("web", "--listen", address)
        assert (done.returncode, len(done.stderr.splitlines())) == (USAGE, 1), address
        assert "--listen" in done.stderr


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a..b", "[2001:db8::1]"])
def test_where_it_cannot_listen(host: str) -> None:
    done = nbdmirror("web", "--listen", f"{host}:{free_port()}")
    assert (done.returncode, len(done.stderr.splitlines())) == (FAILED, 1)
    assert done.stderr.startswith("nbdmirror: --listen: ")


@pytest.mark.parametrize("is_listening", [True, False], ids=["listening", "bound"])
def test_a_port_in_use(is_listening: bool) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if is_listening:
            other.listen()
        port = other.getsockname()[1]
        done = nbdmirror("web", "--listen", f"127.0.0.1:{port}")
    assert done.returncode == FAILED
    text = f"cannot listen on 127.0.0.1 port {port}: Address already in use"
    assert done.stderr == f"nbdmirror: --listen: {text}\n"


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFIFO, stat.S_IFCHR])
def test_a_socket_that_is_none(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "path"
    if kind == stat.S_IFCHR:
        path.symlink_to("/dev/null")
    else:
        os.mknod(path, kind | 0o600)
    done = nbdmirror("web", str(path))
    assert (done.returncode, len(done.stderr.splitlines())) == (NO_SERVER, 1)
    assert f"no server at {path} (that is " in done.stderr


def test_a_place_that_is_not_there_yet(folder: Path, start: Start) -> None:
    """Its server may start later; whoever mistyped it is told."""
    server = served(folder, "a")
    web = start(Web(folder, server.qmp_path))
    assert f"warning: {server.qmp_path}: does not exist" in web.stderr
    wait_until(lambda: up(web) == {"a": 0}, "it is said to be missing")
    start(server)
    wait_until(lambda: up(web) == {"a": 1}, "it is there")


def test_a_directory_that_is_not_there_yet(folder: Path, start: Start) -> None:
    """A / at its end says that it is none but a directory: nothing is amiss meanwhile."""
    place = folder / "later"
    web = start(Web(folder, f"{place}/"))
    wait_until(lambda: "does not exist; its server may start yet" in web.stderr, "it is warned of")
    assert web.json("/status") == []
    place.mkdir()
    server = Nbdmirror(folder, make_image(folder / "disk.img", MiB))
    server.qmp_path = place / "a.qmp"
    start(server)
    wait_until(lambda: str(server.qmp_path) in web.get("/status")[1], "its server is there")


@pytest.mark.parametrize("missing", ["uvicorn", "starlette", "prometheus_client"])
def test_without_the_extra(missing: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import nbdmirror.cli.main as m"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(m.main(['web']))"],
        env=nbdmirror_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    text = f"web: the Python package {missing} is not installed: pip install 'nbdmirror[web]'"
    assert (done.returncode, done.stderr) == (FAILED, f"nbdmirror: {text}\n")


def test_a_log_that_nobody_reads(folder: Path, start: Start) -> None:
    web = Web(folder, folder / "none")
    near, far = os.pipe()
    os.close(near)
    process = subprocess.Popen(web.argv(), env=web.environment(), stdout=far, stderr=far)
    os.close(far)
    try:
        wait_until(web.is_ready, "it serves")
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    assert process.returncode == DONE
