"""Bad input: one clear error in the place where the user looks; a running guest never notices;
nothing on the source or the target is touched."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clients import connected
from fixtures import Identical, Start
from guests import Guest
from images import MiB, assert_identical, make_image, make_noise
from processes import Finished, free_port, nbdmirror, run
from qmpclient import Qmp
from serverprocess import Server
from servers import PLUGIN, NbdkitTarget, Nbdmirror, QemuNbd
from waiting import wait_until

SIZE = 2 * MiB
GARBAGE_BYTES = 100_000_000


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


@pytest.fixture
def server(start: Start, disk: Path) -> Nbdmirror:
    return start(Nbdmirror(disk.parent, disk, bare=True))


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def untouched(*paths: Path) -> Iterator[None]:
    before = [(path.stat().st_mtime_ns, hash_of(path)) for path in paths]
    yield
    assert before == [(path.stat().st_mtime_ns, hash_of(path)) for path in paths]


def one_line(done: Finished, *words: str, status: int = 1) -> str:
    """The error: exit status, one line on stderr that has those words, no traceback."""
    said = done.stderr.strip()
    assert done.returncode == status, f"exit {done.returncode}: {done.stdout}{said}"
    assert len(said.splitlines()) == 1, said
    assert "Traceback" not in said
    for word in words:
        assert word in said, said
    return said


def serve(folder: Path, *arguments: str | Path) -> Finished:
    """`nbdmirror serve` with what must be refused."""
    where = ("--socket", folder / "s", "--qmp", folder / "q")
    done = nbdmirror("serve", *arguments, *(where if "--socket" not in arguments else where[2:]))
    assert not (folder / "s").exists(), "a refused start leaves nothing behind"
    assert not (folder / "q").exists(), "a refused start leaves nothing behind"
    return done


def bare(folder: Path, *parameters: str | Path) -> Finished:
    """nbdkit with the plugin and what must be refused."""
    done = run("nbdkit", "-f", "-U", folder / "s", "python", PLUGIN, *parameters, check=False)
    (folder / "s").unlink(missing_ok=True)  # nbdkit's own, which it does not remove
    return done


# Disks that cannot be served


def test_a_missing_disk(folder: Path) -> None:
    one_line(serve(folder, folder / "nope.img"), "nope.img")
    one_line(bare(folder, f"file={folder}/nope.img"), "nope.img", "does not exist")


def test_a_missing_disk_in_the_background(folder: Path) -> None:
    """The parent says it, before it has gone."""
    done = serve(folder, folder / "nope.img", "--daemonize", "--pidfile", folder / "pid")
    one_line(done, "nope.img")
    done = run("nbdkit", "-U", folder / "s", "python", PLUGIN, "file=/nope.img", check=False)
    one_line(done, "/nope.img")
    assert not (folder / "pid").exists()


def test_a_directory(folder: Path) -> None:
    one_line(serve(folder, folder), str(folder), "directory")
    one_line(bare(folder, f"file={folder}"), str(folder), "directory")


def test_what_is_no_disk(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    one_line(serve(folder, folder / "fifo"), "fifo")
    one_line(serve(folder, "/dev/null"), "/dev/null")


def test_an_unreadable_disk(disk: Path) -> None:
    """As root, who may read anything, by way of a user who may not."""
    disk.chmod(0)
    plugin = run("nbdkit", "-f", "-U", disk.parent / "s", "python", PLUGIN, "--help", check=False)
    assert plugin.returncode == 0, plugin.stderr
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "nbdkit", "-f"]
        disk.parent.chmod(0o755)
        socket_path = disk.parent / "open" / "s"
        socket_path.parent.mkdir()
        socket_path.parent.chmod(0o777)
        done = run(*command, "-U", socket_path, "python", PLUGIN, f"file={disk}", check=False)
        if "PLUGIN" in done.stderr or "nbdmirror-plugin.py: Permission" in done.stderr:
            pytest.skip("the checkout is not readable for other users")
        if "No module named" in done.stderr:
            pytest.skip("the virtual environment is not readable for other users")
    else:
        done = bare(disk.parent, f"file={disk}")
    one_line(done, "disk.img", "Permission denied")


@pytest.mark.parametrize(
    "uri", ["nbd+unix:///?socket=/nope.sock", "nbd://127.0.0.1:1/x", "nbd://nosuch.invalid/"]
)
def test_an_nbd_source_that_is_not_there(folder: Path, uri: str) -> None:
    one_line(serve(folder, uri), uri)


def test_an_unknown_export_as_the_source(start: Start, disk: Path) -> None:
    behind = start(QemuNbd(disk.parent, disk, export="here"))
    with untouched(disk):
        one_line(serve(disk.parent, behind.uri("elsewhere")), "elsewhere")


def test_a_read_only_nbd_source_says_what_to_do(start: Start, disk: Path) -> None:
    behind = start(QemuNbd(disk.parent, disk, read_only=True))
    one_line(serve(disk.parent, behind.uri()), "read-only")


def test_two_disks_of_one_name(disk: Path) -> None:
    one_line(serve(disk.parent, f"a={disk}", f"a={disk}"), "a")
    one_line(bare(disk.parent, f"file=a={disk}", f"file=a={disk}"), "'a'")
    one_line(serve(disk.parent, f"disk1={disk}", disk), "disk1")


def test_a_second_disk_that_fails_leaves_nothing_started(disk: Path) -> None:
    with untouched(disk):
        one_line(serve(disk.parent, disk, disk.parent / "nope.img"), "nope.img")
        folder = disk.parent
        done = bare(folder, f"file={disk}", "file=/nope.img", f"qmp={folder}/q")
        one_line(done, "/nope.img")
        assert not (folder / "q").exists()


# Parameters


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--sokcet", "x"], "--sokcet"),
        (["--cache", "writethrough"], "writethrough"),
        (["--port", "many"], "many"),
        (["--port", "70000"], "--port"),
        (["--port", "0"], "--port"),
        (["--threads", "0"], "--threads"),
        (["--tls", "maybe"], "maybe"),
        (["--qmp"], "--qmp"),
    ],
)
def test_wrong_options_of_serve(disk: Path, arguments: list[str], word: str) -> None:
    done = nbdmirror("serve", disk, *arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert word in last and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["", "srve", "mirror", "wait", "set-speed"])
def test_wrong_commands(command: str) -> None:
    done = nbdmirror(*command.split())
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip()


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        ("fil=x", ["fil"]),
        ("filee=x", ["filee"]),
        ("qpm=x", ["qpm"]),
        ("cache=maybe", ["cache", "maybe"]),
        ("read-only=perhaps", ["read-only", "perhaps"]),
        ("mirror-to=/a/path", ["mirror-to", "/a/path"]),
        ("file=", ["file"]),
        ("qmp=/nope/q", ["qmp", "/nope/q"]),
        ("qmp=/" + "q" * 200, ["qmp", "long"]),
    ],
)
def test_wrong_plugin_parameters(disk: Path, parameter: str, words: list[str]) -> None:
    with untouched(disk):
        one_line(bare(disk.parent, f"file={disk}", parameter), *words)


def test_no_disk_at_all(folder: Path) -> None:
    one_line(bare(folder), "file=")


# Places that are taken


def test_a_tcp_port_in_use(disk: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = nbdmirror("serve", disk, "--port", str(port), "--qmp", disk.parent / "q")
        one_line(done, str(port), "in use")
        assert not (disk.parent / "q").exists()


def test_a_port_with_a_live_server_of_ours(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk, tcp=True))
    again = ("--port", str(server.port), "--qmp", disk.parent / "q")
    one_line(nbdmirror("serve", disk, *again), str(server.port))
    assert_identical(disk, server.uri())


@pytest.mark.parametrize("which", ["--socket", "--qmp"])
def test_a_live_socket_is_not_taken_over(start: Start, disk: Path, which: str) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    server.allowed = ["sending newstyle handshake"]  # to who looks whether it lives
    taken = server.socket if which == "--socket" else server.qmp_path
    other = disk.parent / "other"
    places = {"--socket": other, "--qmp": other} | {which: taken}
    words = [str(word) for place in places.items() for word in place]
    one_line(nbdmirror("serve", disk, *words), which, str(taken), "in use")
    assert not other.exists()
    assert_identical(disk, server.uri())
    assert server.qmp.execute("query-status")["running"] is True


def test_a_live_control_socket_is_not_taken_over_bare(start: Start, disk: Path) -> None:
    server = start(Nbdmirror(disk.parent, disk))
    other = make_image(disk.parent / "other.img", SIZE)
    one_line(bare(disk.parent, f"file={other}", f"qmp={server.qmp_path}"), "qmp", "in use")
    assert server.qmp.execute("query-status")["running"] is True


def test_stale_sockets_are_taken_over(start: Start, disk: Path) -> None:
    server = Nbdmirror(disk.parent, disk)
    for path in (server.socket, server.qmp_path):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    start(server)
    assert_identical(disk, server.uri())


@pytest.mark.parametrize("which", ["--socket", "--qmp"])
def test_a_file_that_is_no_socket_is_left_alone(disk: Path, which: str) -> None:
    precious = disk.parent / "precious"
    precious.write_text("data")
    places = {"--socket": disk.parent / "s", "--qmp": disk.parent / "q"} | {which: precious}
    words = [str(word) for place in places.items() for word in place]
    with untouched(precious):
        one_line(nbdmirror("serve", disk, *words), which, "precious")


def test_sockets_in_a_directory_that_is_not_there(disk: Path) -> None:
    one_line(nbdmirror("serve", disk, "--socket", "/nope/s", "--qmp", disk.parent / "q"), "/nope")
    one_line(nbdmirror("serve", disk, "--socket", disk.parent / "s", "--qmp", "/nope/q"), "/nope")


# Targets that are refused, by QMP and by the command line


@pytest.fixture
def refuse(server: Nbdmirror, disk: Path) -> Callable[..., None]:
    """Both ways to start a mirror refuse that target, with those words; there is no job, and the
    disk is as it was and still written to by its guest."""

    def check(uri: str, *words: str, **options: str) -> None:
        with untouched(disk):
            text = server.qmp.refusal(
                "drive-mirror", device="disk0", target=uri, mode="existing", sync="full", **options
            )
            for word in words:
                assert word in text, text
            assert "\n" not in text
            done = nbdmirror("mirror", uri, "--qmp", server.qmp_path)
            one_line(done, *words)
            assert server.qmp.execute("query-jobs") == []
            left = server.qmp.execute("query-named-block-nodes")
            assert [node["node-name"] for node in left] == ["disk0"], "no node is left behind"
        with Guest(server.uri(), disk) as guest:
            guest.wait_for_requests(20)
        assert_identical(guest.model, disk)

    return check


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("nbd+unix:///?socket=/nope.sock", ["/nope.sock", "No such file"]),
        ("nbd://127.0.0.1:{port}/x", ["127.0.0.1", "refused"]),
        ("nbd://nosuch.invalid/", ["nosuch.invalid"]),
        ("http://127.0.0.1/", ["http://127.0.0.1/"]),
        ("/a/path", ["/a/path"]),
    ],
)
def test_a_target_that_is_not_there(
    refuse: Callable[..., None], uri: str, words: list[str]
) -> None:
    refuse(uri.format(port=free_port()), *words)


def test_a_target_that_is_no_nbd_server(refuse: Callable[..., None]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        uri = f"nbd://127.0.0.1:{other.getsockname()[1]}/"

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with other.accept()[0] as client:
                        client.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n" * 100)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        refuse(uri, uri)
        other.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_a_target_that_never_answers(server: Nbdmirror, disk: Path) -> None:
    """The handshake hangs: the command comes back within its open-timeout; all others go on."""
    qmp = server.qmp
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        host, port = silent.getsockname()
        address = {"type": "inet", "host": host, "port": str(port)}
        began_s = time.monotonic()
        with Guest(server.uri(), disk) as guest, Qmp(server.qmp_path) as other:
            message = {
                "execute": "blockdev-add",
                "arguments": {
                    "driver": "nbd",
                    "node-name": "t",
                    "server": address,
                    "open-timeout": 1,
                },
            }
            qmp.socket.sendall(json.dumps(message).encode())
            assert other.execute("query-jobs") == []
            guest.wait_for_requests(100)
            answer = qmp._read()
            assert time.monotonic() - began_s < 5.0
            assert "desc" in answer["error"]
            assert other.execute("query-named-block-nodes")[0]["node-name"] == "disk0"
        assert_identical(guest.model, disk)


def test_an_unknown_export_as_the_target(
    start: Start, folder: Path, refuse: Callable[..., None]
) -> None:
    image = make_noise(folder / "target.img", SIZE)
    target = start(QemuNbd(folder, image, export="here"))
    with untouched(image):
        refuse(target.uri("elsewhere"), "elsewhere")


def test_a_read_only_target(start: Start, folder: Path, refuse: Callable[..., None]) -> None:
    image = make_noise(folder / "target.img", SIZE)
    target = start(QemuNbd(folder, image, read_only=True))
    with untouched(image):
        refuse(target.uri(), "read-only")


def test_a_target_without_flush(start: Start, folder: Path, refuse: Callable[..., None]) -> None:
    image = make_noise(folder / "target.img", SIZE)
    target = start(
        NbdkitTarget(
            folder,
            "eval",
            f"get_size=echo {SIZE}",
            f"pread=dd if={image} skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none",
            f"pwrite=dd of={image} seek=$4 conv=notrunc oflag=seek_bytes status=none",
            "can_write=exit 0",
            "can_flush=exit 3",
        )
    )
    with connected(target.uri()) as handle:
        assert not handle.can_flush() and not handle.is_read_only()
    with untouched(image):
        refuse(target.uri(), "flush")


@pytest.mark.parametrize("size", [0, SIZE - 512, SIZE + 1, 2 * SIZE])
def test_a_target_of_another_size(
    start: Start, folder: Path, server: Nbdmirror, disk: Path, size: int
) -> None:
    """As QEMU has it: the command succeeds, and the job fails at once."""
    image = make_noise(folder / "target.img", size)
    target = start(NbdkitTarget(folder, "file", f"file={image}"))
    server.allowed = ["the source has .* the target"]
    qmp = server.qmp
    with untouched(image, disk):
        qmp.add_target("t", target)
        qmp.forget()
        qmp.start_mirror("t", auto_dismiss=False)
        told = qmp.wait_for_event("BLOCK_JOB_COMPLETED")
        qmp.wait_status("concluded")
        expected = {"device": "j", "len": 0, "offset": 0, "speed": 0, "type": "mirror"}
        assert told == expected | {"error": "Source and target image have different sizes"}
        started = ["created", "running", "return"]
        assert qmp.steps("j") == [*started, "aborting", "BLOCK_JOB_COMPLETED", "concluded"]
        assert qmp.job()["error"] == told["error"]
        qmp.execute("job-dismiss", id="j")
        done = nbdmirror("mirror", target.uri(), "--wait", "ready", "--qmp", server.qmp_path)
        one_line(done, f"{SIZE} bytes", f"target {size}:", "--allow-larger-target")
        done = nbdmirror("mirror", target.uri(), "--qmp", server.qmp_path)
        one_line(done, f"{SIZE} bytes", f"target {size}:", "--allow-larger-target")
    with Guest(server.uri(), disk) as guest:
        guest.wait_for_requests(20)
    assert_identical(guest.model, disk)


def test_a_larger_target_if_asked_for(
    start: Start, folder: Path, server: Nbdmirror, disk: Path, identical: Identical
) -> None:
    image = make_noise(folder / "target.img", SIZE + 5000)
    tail = image.read_bytes()[SIZE:]
    target = start(NbdkitTarget(folder, "file", f"file={image}"))
    with Guest(server.uri(), disk) as guest:
        server.qmp.start_mirror(target.uri(), **{"x-nbdmirror-allow-larger-target": True})
        server.qmp.wait_ready()
        server.qmp.complete()
        guest.wait_for_requests(30)
        with connected(server.uri()) as handle:
            assert handle.get_size() == SIZE
    identical(bytes(guest.model) + tail, image)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("export", ["", "disk0", "disk1"])
def test_the_target_is_an_export_of_ours(
    start: Start, folder: Path, disk: Path, tcp: bool, export: str
) -> None:
    second = make_noise(folder / "second.img", SIZE)
    server = start(Nbdmirror(folder, disk, second, tcp=tcp))
    with untouched(disk, second):
        for uri in (server.uri(export), server.uri(export).replace("127.0.0.1", "localhost")):
            text = server.qmp.refusal(
                "drive-mirror", device="disk0", target=uri, mode="existing", sync="full"
            )
            assert "itself" in text or "Can't" in text or "refused" in text, text
        assert server.qmp.execute("query-jobs") == []


def test_a_target_that_is_a_running_jobs_target(
    start: Start, folder: Path, server: Nbdmirror, disk: Path, identical: Identical
) -> None:
    target = start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))
    qmp = server.qmp
    identical(disk, target.uri())
    qmp.add_target("t", target)
    qmp.start_mirror("t", speed=65536, buf_size=65536)
    busy = {"device": "disk0", "sync": "full"}
    assert qmp.refusal("blockdev-mirror", job_id="k", target="t", **busy)
    assert qmp.refusal("blockdev-mirror", job_id="j", target="t", **busy)
    assert "in use" in qmp.refusal("blockdev-del", node_name="t")
    assert len(qmp.execute("query-jobs")) == 1
    qmp.execute("block-job-set-speed", device="j", speed=0)
    qmp.wait_ready()
    qmp.complete()


def test_wrong_arguments_start_nothing(
    start: Start, folder: Path, server: Nbdmirror, disk: Path
) -> None:
    image = make_noise(folder / "target.img", SIZE)
    target = start(QemuNbd(folder, image))
    qmp = server.qmp
    qmp.add_target("t", target)
    good = {"job-id": "j", "device": "disk0", "target": "t", "sync": "full"}
    with untouched(image, disk):
        for wrong, text in (
            ({"sync": "dirty"}, "Parameter 'sync' does not accept value 'dirty'"),
            ({"spede": 1}, "Parameter 'spede' is unexpected"),
            ({"speed": "fast"}, "Invalid parameter type for 'speed', expected: integer"),
            ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
            ({"granularity": 1000}, "Parameter 'granularity' expects a power of 2"),
            ({"granularity": 256}, "Parameter 'granularity' expects a value in range"),
            ({"granularity": -1}, "Parameter 'granularity' expects uint32_t"),
            ({"buf-size": -1}, "Invalid parameter 'buf-size'"),
            ({"device": "nope"}, "Cannot find device='nope' nor node-name='nope'"),
            ({"target": "nope"}, "Cannot find device='nope' nor node-name='nope'"),
            ({"job-id": "1j"}, "Invalid job ID '1j'"),
            ({"on-target-error": "cry"}, "Parameter 'on-target-error' does not accept value"),
            ({"unmap": "yes"}, "Invalid parameter type for 'unmap', expected: boolean"),
            ({"target": None}, "Invalid parameter type for 'target', expected: string"),
        ):
            assert text in qmp.refusal("blockdev-mirror", **(good | wrong))
            assert qmp.execute("query-jobs") == []
        assert "mode" in qmp.refusal(
            "drive-mirror", device="disk0", target=target.uri(), sync="full"
        )


def test_a_mirror_to_that_fails_does_not_keep_the_disk_from_its_guest(
    start: Start, disk: Path
) -> None:
    """And says so, at the start or in the log; not silently."""
    server = Nbdmirror(disk.parent, disk, options=("--mirror-to", "nbd+unix:///?socket=/nope"))
    server.allowed = ["mirror-to"]
    start(server)
    wait_until(lambda: "/nope" in server.stderr, "the log names the target")
    assert_identical(disk, server.uri())
    assert server.qmp.execute("query-jobs") == []


def test_no_server_there(folder: Path) -> None:
    for command in ("status", "complete", "cancel", "pause", "resume", "events"):
        done = nbdmirror(command, "--qmp", folder / "nope")
        one_line(done, str(folder / "nope"), status=3)


# Control clients that misbehave


@pytest.fixture
def bystanders(server: Nbdmirror, disk: Path) -> Iterator[None]:
    """A guest and a well-behaved control client, before, meanwhile and after."""
    server.allowed = ["qmp"]  # it may say what it thinks of the client
    with Guest(server.uri(), disk, connections=2) as guest, Qmp(server.qmp_path) as other:
        guest.wait_for_requests(20)
        yield
        guest.wait_for_requests(100)
        assert other.execute("query-status")["running"] is True
    assert_identical(guest.model, disk)
    assert guest.longest_s < 1.0


@contextlib.contextmanager
def raw_client(server: Nbdmirror) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(server.qmp_path))
        client.recv(4096)  # the greeting
        yield client


def lines(client: socket.socket, count: int) -> list[dict[str, object]]:
    received = b""
    while received.count(b"\n") < count:
        part = client.recv(65536)
        assert part, f"closed after {received!r}"
        received += part
    return [json.loads(line) for line in received.splitlines()]


@pytest.mark.usefixtures("bystanders")
def test_garbage(server: Nbdmirror) -> None:
    with raw_client(server) as client:
        client.sendall(b"garbage\n")
        assert "error" in lines(client, 1)[0]
        client.sendall(b"\x00\xff\xfe{{{{\n")
        lines(client, 1)
    with raw_client(server) as client:
        client.sendall(os.urandom(100_000))


@pytest.mark.usefixtures("bystanders")
def test_half_a_line(server: Nbdmirror) -> None:
    with raw_client(server) as client, raw_client(server) as leaver:
        client.sendall(b'{"execute": "qmp_capab')
        leaver.sendall(b'{"execute": "qmp_capab')
        leaver.close()
        assert server.qmp.execute("query-jobs") == []
        client.sendall(b'ilities"}')
        assert lines(client, 1)[0] == {"return": {}}


@pytest.mark.usefixtures("bystanders")
def test_a_hundred_megabytes_without_a_newline(server: Nbdmirror) -> None:
    def resident() -> int:
        status = Path(f"/proc/{server.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    before = resident()
    for start_of_text in (b"x", b'"', b'{"execute": "', b"[" * 100, b" "):
        with raw_client(server) as client, contextlib.suppress(ConnectionError, TimeoutError):
            client.sendall(start_of_text)
            piece = start_of_text[-1:] * (1 << 20)
            for _ in range(GARBAGE_BYTES >> 20):
                client.sendall(piece)
                if resident() - before > 256 * MiB:
                    break
        assert resident() - before < 64 * MiB


@pytest.mark.usefixtures("bystanders")
def test_a_client_that_never_reads(server: Nbdmirror) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(str(server.qmp_path))
        client.settimeout(1)
        with contextlib.suppress(OSError):
            client.sendall(b'{"execute": "qmp_capabilities"}\n')
            for _ in range(20_000):
                client.sendall(b'{"execute": "query-commands"}\n')
        with Qmp(server.qmp_path) as other:
            began_s = time.monotonic()
            for _ in range(20):
                other.execute("query-commands")
            assert time.monotonic() - began_s < 5


def test_a_client_that_never_reads_events_does_not_stop_a_job(
    start: Start, folder: Path, server: Nbdmirror, disk: Path, identical: Identical
) -> None:
    target: Server = start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))
    with raw_client(server) as deaf, Guest(server.uri(), disk) as guest:
        deaf.sendall(b'{"execute": "qmp_capabilities"}')
        identical(guest, target.uri())
        server.qmp.add_target("t", target)
        for _ in range(60):
            server.qmp.start_mirror("t")
            server.qmp.wait_ready()
            server.qmp.execute("job-cancel", id="j")
            server.qmp.wait_status("null")
        server.qmp.start_mirror("t")
        server.qmp.wait_ready()
        server.qmp.complete()
        guest.wait_for_requests(30)


@pytest.mark.usefixtures("bystanders")
def test_many_control_clients(server: Nbdmirror) -> None:
    """More than it takes are turned away; when they have gone there is room again."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        for _ in range(60):
            stack.enter_context(raw_client(server))

    def is_answering() -> bool:
        with contextlib.suppress(ConnectionError), Qmp(server.qmp_path) as client:
            return client.execute("query-jobs") == []
        return False

    wait_until(is_answering, "it answers again")


def test_the_export_that_the_disk_is_served_from(start: Start, disk: Path) -> None:
    behind = start(QemuNbd(disk.parent, disk, shared=20))
    server = start(Nbdmirror(disk.parent, behind.uri()))
    with untouched(disk):
        text = server.qmp.refusal(
            "drive-mirror", device="disk0", target=behind.uri(), sync="full", mode="existing"
        )
        assert "is the disk itself" in text


def test_a_transaction_that_a_job_refuses_changes_nothing(start: Start, folder: Path) -> None:
    disk, image = make_noise(folder / "a.img", SIZE), make_noise(folder / "b.img", SIZE)
    target = start(QemuNbd(folder, image))
    server = start(Nbdmirror(folder, disk))
    qmp = server.qmp
    qmp.execute(
        "drive-mirror", job_id="j", device="disk0", target=target.uri(), sync="full",
        mode="existing",
    )  # fmt: skip
    qmp.execute("job-pause", id="j")
    text = qmp.refusal(
        "transaction",
        actions=[
            {"type": "block-dirty-bitmap-add", "data": {"node": "disk0", "name": "c"}},
            {"type": "block-job-cancel", "data": {"device": "j"}},
        ],
    )
    assert "currently paused" in text
    assert "not found" in qmp.refusal("block-dirty-bitmap-remove", node="disk0", name="c")
