"""Targets and arguments of a mirror that are refused, by QMP and by the command line: one clear
error in the place where the user looks; a running guest never notices; nothing on the source or the
target is touched."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from integration.bad_input.badparts import SIZE, one_line, untouched
from support.clients import connected
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import assert_identical, make_noise
from support.processes import free_port, nbdmirror
from support.qmpclient import Qmp
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd
from support.waiting import wait_until


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
            began_s = time.monotonic()
            qmp.socket.sendall(json.dumps(message).encode())
            assert other.execute("query-jobs") == []
            answer = qmp._read()
            assert time.monotonic() - began_s < 5.0
            assert "desc" in answer["error"]
            guest.wait_for_requests(100)
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


@pytest.mark.rule(27, 43)
@pytest.mark.parametrize("target_size", [0, SIZE - 512, SIZE + 1, 2 * SIZE])
def test_a_target_of_another_size(
    start: Start, folder: Path, server: Nbdmirror, disk: Path, target_size: int
) -> None:
    """As QEMU has it: the command succeeds, and the job fails at once."""
    image = make_noise(folder / "target.img", target_size)
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
        one_line(done, f"{SIZE} bytes", f"target {target_size}:", "--allow-larger-target")
        done = nbdmirror("mirror", target.uri(), "--qmp", server.qmp_path)
        one_line(done, f"{SIZE} bytes", f"target {target_size}:", "--allow-larger-target")
    with Guest(server.uri(), disk) as guest:
        guest.wait_for_requests(20)
    assert_identical(guest.model, disk)


@pytest.mark.rule(43)
def test_a_larger_target_if_asked_for(
    start: Start, folder: Path, server: Nbdmirror, disk: Path, identical: Identical
) -> None:
    image = make_noise(folder / "target.img", SIZE + 5000)
    tail = image.read_bytes()[SIZE:]
    target = start(NbdkitTarget(folder, "file", f"file={image}"))
    with Guest(server.uri(), disk) as guest:
        larger: dict[str, Any] = {"x-nbdmirror-allow-larger-target": True}
        server.qmp.start_mirror(target.uri(), **larger)
        server.qmp.wait_ready()
        server.qmp.complete()
        guest.wait_for_requests(30)
        with connected(server.uri()) as handle:
            assert handle.get_size() == SIZE
    identical(bytes(guest.model) + tail, image)


@pytest.mark.rule(44)
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


@pytest.mark.rule(38)
@pytest.mark.guarantee("What is refused has changed nothing")
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


@pytest.mark.rule(44)
@pytest.mark.parametrize("shared", [20, 1])
def test_the_export_that_a_disk_is_served_from(start: Start, disk: Path, shared: int) -> None:
    """Also if its server has no room for another client, and would say nothing at all."""
    folder = disk.parent
    behind = start(QemuNbd(folder, disk, shared=shared))
    other = make_noise(folder / "other.img", disk.stat().st_size)
    server = start(Nbdmirror(folder, f"a={behind.uri()}", f"b={other}"))

    def refusal(device: str) -> str:
        return server.qmp.refusal(
            "drive-mirror", device=device, target=behind.uri(), sync="full", mode="existing"
        )

    with untouched(disk):
        assert refusal("a") == f"Target '{behind.uri()}' is the disk itself"
        assert refusal("b") == f"Target '{behind.uri()}' is in use: 'a' is the same export"


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
