"""What a control client can make the server keep is bounded, and what passes a bound is one clear
error: nothing else changes, and guests do not notice. docs/security.md has the list."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_empty, make_image, make_noise
from support.qmpclient import Qmp, Refused
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.disk.bitmap import BITS_BYTES_MAX
from nbdmirror.limits import TARGET_TIMEOUT_S_MAX
from nbdmirror.nbd_uri import URI_BYTES_MAX
from nbdmirror.qmp.mirror_commands import BUFFER_BYTES_MAX, JOB_ID_LENGTH_MAX
from nbdmirror.qmp.server import CLIENTS_MAX
from nbdmirror.qmp.transaction import ACTIONS_MAX
from nbdmirror.server.bitmaps import BITMAPS_MAX, BYTES_MAX, NAME_BYTES_MAX
from nbdmirror.server.mirror_jobs import JOBS_MAX
from nbdmirror.server.nodes import NAME_LENGTH_MAX, NODES_MAX

SIZE = MiB
TiB = 1 << 40


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


@pytest.fixture
def server(start: Start, disk: Path) -> Iterator[Nbdmirror]:
    """With a guest that notices nothing."""
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    server.allowed = ["the source has", "qmp: client"]
    with Guest(server.uri(), disk) as guest:
        yield server
        guest.wait_for_requests(50)
    assert_identical(guest.model, disk)


def many_targets(start: Start, folder: Path, size: int = SIZE) -> NbdkitTarget:
    return start(NbdkitTarget(folder, "memory", str(size), options=("-t", "1")))


def test_nodes(start: Start, folder: Path, server: Nbdmirror) -> None:
    target = many_targets(start, folder)
    qmp = server.qmp
    for number in range(NODES_MAX):
        qmp.add_target(f"n{number}", target)
    address = {"type": "unix", "path": str(target.socket)}
    one_more = {"driver": "nbd", "node_name": "more", "server": address}
    assert "blockdev-del" in qmp.refusal("blockdev-add", **one_more)
    mirror = {"device": "disk0", "target": target.uri(), "mode": "existing", "sync": "full"}
    assert "blockdev-del" in qmp.refusal("drive-mirror", **mirror)
    assert len(qmp.execute("query-named-block-nodes")) == NODES_MAX + 1
    qmp.execute("blockdev-del", node_name="n0")
    qmp.execute("blockdev-add", **one_more)


def test_jobs(start: Start, folder: Path, server: Nbdmirror) -> None:
    """Concluded ones, that nobody dismisses."""
    qmp = server.qmp
    qmp.add_target("t", many_targets(start, folder, SIZE + 512))
    for number in range(JOBS_MAX):
        qmp.start_mirror("t", job_id=f"j{number}", auto_dismiss=False)
        qmp.wait_status("concluded", f"j{number}")
    refused = {"device": "disk0", "target": "t", "sync": "full", "job_id": "more"}
    assert "dismiss" in qmp.refusal("blockdev-mirror", **refused)
    qmp.execute("job-dismiss", id="j0")
    qmp.start_mirror("t", job_id="more")


def test_bitmaps_by_count(server: Nbdmirror) -> None:
    qmp = server.qmp
    for number in range(BITMAPS_MAX):
        qmp.execute("block-dirty-bitmap-add", node="disk0", name=f"b{number}")
    more = {"node": "disk0", "name": "more"}
    assert "remove some" in qmp.refusal("block-dirty-bitmap-add", **more)
    actions = [{"type": "block-dirty-bitmap-add", "data": more}]
    assert "remove some" in qmp.refusal("transaction", actions=actions)
    for number in range(BITMAPS_MAX):
        qmp.execute("block-dirty-bitmap-remove", node="disk0", name=f"b{number}")
    qmp.execute("block-dirty-bitmap-add", **more)


def test_bitmaps_by_bytes(start: Start, folder: Path, server: Nbdmirror) -> None:
    """Of a large disk. What only changes the bitmaps that are there needs no room."""
    size = 4 * TiB
    huge = start(Nbdmirror(folder, make_empty(folder / "huge", size), bare=True))
    qmp = huge.qmp
    granularity = size // 8 // (BYTES_MAX // 8)  # 128 MiB each
    for number in range(7):
        qmp.execute(
            "block-dirty-bitmap-add", node="disk0", name=f"b{number}", granularity=granularity
        )
    clear = [
        {"type": "block-dirty-bitmap-clear", "data": {"node": "disk0", "name": f"b{number}"}}
        for number in range(2)
    ]
    qmp.execute("block-dirty-bitmap-add", node="disk0", name="last", granularity=granularity)
    qmp.execute("transaction", actions=clear)
    qmp.execute("block-dirty-bitmap-merge", node="disk0", target="b0", bitmaps=["b1"])
    assert "1024 MiB together" in qmp.refusal("block-dirty-bitmap-add", node="disk0", name="more")
    qmp.execute("block-dirty-bitmap-remove", node="disk0", name="b0")
    qmp.execute("block-dirty-bitmap-add", node="disk0", name="more")


def test_granules_of_a_bitmap_and_of_a_mirror(start: Start, folder: Path) -> None:
    """Of a disk that is large beyond reason."""
    size = BITS_BYTES_MAX * 8 * 65536 * 4  # 1 PiB
    huge = start(Nbdmirror(folder, make_empty(folder / "huge", size), bare=True))
    huge.qmp.add_target("t", many_targets(start, folder))
    for command, arguments in (
        ("block-dirty-bitmap-add", {"node": "disk0", "name": "b"}),
        ("blockdev-mirror", {"device": "disk0", "target": "t", "sync": "full"}),
    ):
        text = huge.qmp.refusal(command, **arguments)
        assert f"'granularity' expects at least {65536 * 4}" in text
        assert "granularity" in huge.qmp.refusal(command, granularity=4096, **arguments)
    assert huge.qmp.execute("query-jobs") == []
    huge.qmp.execute("block-dirty-bitmap-add", node="disk0", name="b", granularity=65536 * 4)


def test_actions_of_a_transaction(server: Nbdmirror) -> None:
    qmp = server.qmp
    qmp.execute("block-dirty-bitmap-add", node="disk0", name="b")
    enable = {"type": "block-dirty-bitmap-enable", "data": {"node": "disk0", "name": "b"}}
    qmp.execute("transaction", actions=[enable] * ACTIONS_MAX)
    assert "at most" in qmp.refusal("transaction", actions=[enable] * (ACTIONS_MAX + 1))


def test_names_and_numbers(start: Start, folder: Path, server: Nbdmirror) -> None:
    qmp, target = server.qmp, many_targets(start, folder)
    qmp.add_target("t", target)
    mirror = {"device": "disk0", "target": "t", "sync": "full"}
    for wrong, text in (
        ({"job_id": "j" * (JOB_ID_LENGTH_MAX + 1)}, "Job ID is longer"),
        ({"buf_size": BUFFER_BYTES_MAX + 1}, "'buf-size' expects at most"),
        ({"buf_size": 2**63 - 1}, "'buf-size' expects at most"),
    ):
        assert text in qmp.refusal("blockdev-mirror", **mirror, **wrong)
    address = {"type": "unix", "path": str(target.socket)}
    node = {"driver": "nbd", "server": address}
    long = "n" * (NAME_LENGTH_MAX + 1)
    assert "too long" in qmp.refusal("blockdev-add", node_name=long, **node)
    late = {"open_timeout": TARGET_TIMEOUT_S_MAX + 1}
    assert "'open-timeout' expects" in qmp.refusal("blockdev-add", node_name="n", **node, **late)
    export = {"export": "x" * URI_BYTES_MAX}
    assert "at most" in qmp.refusal("blockdev-add", node_name="n", **node, **export)
    uri = {"device": "disk0", "sync": "full", "mode": "existing", "target": f"nbd://{'h' * 9000}"}
    assert "at most" in qmp.refusal("drive-mirror", **uri)
    name = {"node": "disk0", "name": "b" * (NAME_BYTES_MAX + 1)}
    assert "too long" in qmp.refusal("block-dirty-bitmap-add", **name)
    qmp.start_mirror("t", job_id="j" * JOB_ID_LENGTH_MAX, buf_size=BUFFER_BYTES_MAX)
    qmp.wait_ready("j" * JOB_ID_LENGTH_MAX)


@contextlib.contextmanager
def silent() -> Iterator[tuple[socket.socket, dict[str, Any]]]:
    """A server that never says a word, and its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        listener.settimeout(30)
        host, port = listener.getsockname()
        yield listener, {"type": "inet", "host": host, "port": str(port)}


def ask(client: Qmp, command: str, **arguments: Any) -> None:
    """Send a command and do not wait."""
    message = {"execute": command, "arguments": arguments}
    client.socket.sendall(json.dumps(message).encode())


@pytest.mark.rule(37)
def test_handshakes_that_never_end_hold_up_their_clients_alone(start: Start, disk: Path) -> None:
    """As many as there are clients; the last one is served at once, and the server ends at once."""
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    with (
        silent() as (listener, address),
        contextlib.ExitStack() as stack,
        Guest(server.uri(), disk) as guest,
    ):
        for number in range(CLIENTS_MAX - 1):
            client = stack.enter_context(Qmp(server.qmp_path))
            options = {"driver": "nbd", "node-name": f"n{number}", "server": address}
            ask(client, "blockdev-add", **options, **{"open-timeout": TARGET_TIMEOUT_S_MAX})
            stack.enter_context(listener.accept()[0])
        guest.wait_for_requests(50)
        last = stack.enter_context(Qmp(server.qmp_path))
        began_s = time.monotonic()
        assert last.execute("query-jobs") == []
        assert len(last.execute("query-named-block-nodes")) == 1
        assert time.monotonic() - began_s < 5
        guest.stop()
        last.execute("quit")
        assert server.process is not None
        assert server.process.wait(20) == 0
    assert_identical(guest.model, disk)


def threads(server: Nbdmirror) -> int:
    return len(os.listdir(f"/proc/{server.pid}/task"))


def test_attempts_to_reconnect_do_not_pile_up(
    start: Start, folder: Path, disk: Path, identical: Identical
) -> None:
    """Each pause and resume begins a new one; those from before give up."""
    target = start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))
    server = start(Nbdmirror(folder, disk, bare=True))
    qmp = server.qmp
    address = {"type": "unix", "path": str(target.socket)}
    qmp.execute("blockdev-add", driver="nbd", node_name="t", server=address, reconnect_delay=10_000)
    qmp.start_mirror("t")
    qmp.wait_ready()
    target.kill()
    wait_until(lambda: "Connection refused" in server.stderr, "it tries to connect again")
    before = threads(server)
    for _ in range(60):
        qmp.execute("block-job-pause", device="j")
        qmp.wait_status("standby")
        qmp.execute("block-job-resume", device="j")
    # Those that sleep between attempts, 0.1 s at first and 5 s at most, find out when they wake.
    wait_until(lambda: threads(server) <= before + 3, "only the last one is left")
    target.come_back()
    wait_until(lambda: qmp.job()["status"] == "ready", "it is ready again")
    qmp.complete()
    identical(disk, target.image)


def test_descriptors(start: Start, disk: Path) -> None:
    """The usual soft limit is raised as far as it may be."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    lines = Path(f"/proc/{server.pid}/limits").read_text().splitlines()
    soft = next(line.split()[3] for line in lines if line.startswith("Max open files"))
    assert int(soft) == min(hard, 65536)


def test_guests_do_not_get_the_last_descriptors(
    start: Start, identical: Identical, disk: Path
) -> None:
    """They are refused, with a line in the log now and then. All others are served, and the mirror
    goes on, over its pivot."""
    target = start(QemuNbd(disk.parent, make_noise(disk.parent / "target.img", MiB)))
    server = Nbdmirror(disk.parent, disk)
    server.inside = ("prlimit", "--nofile=96:96")
    server.allowed = ["no room for another guest", "nbdkit: "]
    start(server)
    with Guest(server.uri(), disk) as guest, contextlib.ExitStack() as stack:
        refused = 0
        for _ in range(300):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(20)
            client.connect(str(server.socket))
            refused += client.recv(8) != b"NBDMAGIC"
        assert refused > 200
        for _ in range(5):
            with Qmp(server.qmp_path) as qmp:
                qmp.execute("query-jobs")
        server.qmp.start_mirror(target.uri())
        server.qmp.wait_ready()
        server.qmp.complete()
        guest.wait_for_requests(20)
        assert server.stderr.count("no room for another guest") < 10
    identical(guest, target.image)
    with connected(server.uri()) as late:
        assert late.pread(SIZE, 0) == guest.model


def test_a_client_that_was_gone_before_its_answer_leaves_its_place(server: Nbdmirror) -> None:
    with silent() as (listener, address):
        for _ in range(CLIENTS_MAX * 2):
            with Qmp(server.qmp_path) as client:
                options = {"driver": "nbd", "node-name": "n", "server": address}
                ask(client, "blockdev-add", **options, **{"open-timeout": 1})
            listener.accept()[0].close()

    def is_served() -> bool:
        with contextlib.suppress(ConnectionError, Refused), Qmp(server.qmp_path) as client:
            return bool(client.execute("query-jobs") == [])
        return False

    wait_until(is_served, "a place among the clients")
