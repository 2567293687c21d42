"""What would mean another server, another file or nothing is refused before anybody connects; what
`serve` accepts, each command takes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from support.fixtures import Identical, Start
from support.images import MiB, assert_identical, make_image, make_noise
from support.kept import Kept
from support.processes import nbdmirror
from support.servers import Nbdmirror, QemuNbd
from support.waiting import wait_until

from nbdmirror.nbd_uri import parse

PORTS = 65536
UUID = "3f2a77c0-7d1e-4c6b-9b1d-0c0ffee00001"


def test_a_port_is_not_taken_modulo_65536(start: Start, folder: Path) -> None:
    """glibc does: another server's disk would be overwritten. Nobody is connected to."""
    server = start(Nbdmirror(folder, make_image(folder / "disk.img", MiB), bare=True))
    mirror = {"device": "disk0", "sync": "full", "mode": "existing"}
    with socket.socket() as victim:
        victim.bind(("127.0.0.1", 0))
        victim.listen()
        victim.settimeout(0)
        port = victim.getsockname()[1] + PORTS
        for uri in (f"nbd://127.0.0.1:{port}/", f"nbd:127.0.0.1:{port}"):
            done = nbdmirror("mirror", uri, "--qmp", server.qmp_path)
            assert done.returncode == 1 and "from 1 to 65535" in done.stderr
            assert "from 1 to 65535" in server.qmp.refusal("drive-mirror", target=uri, **mirror)
            done = nbdmirror("serve", uri, "--socket", folder / "s", "--qmp", folder / "q")
            assert done.returncode == 1 and "from 1 to 65535" in done.stderr
        address = {"type": "inet", "host": "127.0.0.1", "port": str(port)}
        node = {"driver": "nbd", "node-name": "t", "server": address}
        assert "from 1 to 65535" in server.qmp.refusal("blockdev-add", **node)
        with pytest.raises(BlockingIOError):
            victim.accept()


def test_over_qmp_a_relative_path_is_refused(start: Start, folder: Path) -> None:
    server = start(Nbdmirror(folder, make_image(folder / "disk.img", MiB), bare=True))
    refusal = server.qmp.refusal
    unix = {"type": "unix", "path": "t"}
    node = {"driver": "nbd", "node-name": "t"}
    assert "expects an absolute path, not 't'" in refusal("blockdev-add", server=unix, **node)
    inet = {"type": "inet", "host": "127.0.0.1", "port": "1"}
    text = refusal("blockdev-add", server=inet, tls_creds="keys", **node)
    assert "expects an absolute path, not 'keys'" in text
    text = refusal("blockdev-add", server=inet, tls_creds="", **node)
    assert "'tls-creds' is empty" in text, "or else it would be plain text"
    mirror = {"device": "disk0", "sync": "full", "mode": "existing"}
    for target in ("nbd+unix:///?socket=t", "nbd:unix:t", "nbds://h/?tls-psk-file=k"):
        assert "absolute path" in refusal("drive-mirror", target=target, **mirror)


@pytest.mark.parametrize(("typed_in", "name"), [("here", "t"), ("there", "vm/../t")])
def test_a_relative_path_means_what_it_means_where_it_is_typed(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, typed_in: str, name: str
) -> None:
    """The server runs in another directory, which has a socket of that name, too. A `..` behind a
    link leads to what is above the link's end, as for other programs."""
    here, there = folder / "here", folder / "there"
    targets = []
    for place in (here, there):
        place.mkdir()
        target = QemuNbd(folder, make_noise(place / "t.img", MiB, 5), shared=20)
        target.socket = place / "t"
        targets.append(start(target))
    (here / "current").mkdir()
    (there / "vm").symlink_to(here / "current")
    disk = make_noise(folder / "disk.img", MiB, 7)
    before = targets[1].image.read_bytes()
    monkeypatch.chdir(there)
    server = start(Nbdmirror(folder, disk, bare=True))
    monkeypatch.chdir(folder / typed_in)
    uri = f"nbd+unix:///?socket={name}"
    done = nbdmirror(
        "mirror", uri, "--wait", "completed", "--qmp", os.path.relpath(server.qmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert_identical(disk, targets[0].image)
    assert targets[1].image.read_bytes() == before
    bare = start(Nbdmirror(folder, uri, bare=True))
    monkeypatch.chdir(there)
    source = parse(bare.qmp.execute("query-block")[0]["inserted"]["file"]).socket
    assert os.path.isabs(source) and os.path.samefile(source, targets[0].socket)


@pytest.mark.parametrize("name", ["1", UUID, "a.b_c-d", "n" * 200])
def test_each_name_can_be_mirrored(
    start: Start, folder: Path, identical: Identical, name: str
) -> None:
    """With a state directory, a way back, a restart, `--mirror-to`."""
    disk = make_noise(folder / "disk.img", MiB)
    target = start(QemuNbd(folder, make_noise(folder / "target.img", MiB, 9), shared=16))
    server = Kept(folder, disk, "--mirror-to", target.uri())
    server.disks = [f"{name}={disk}"]
    start(server)

    def is_ready() -> bool:
        return any(job["ready"] for job in server.qmp.execute("query-block-jobs"))

    wait_until(is_ready, "the mirror is ready")
    for command in (("pause",), ("resume",), ("set-speed", "0"), ("wait", "--ready")):
        done = nbdmirror(*command, "--device", name, "--qmp", server.qmp_path)
        assert done.returncode == 0, done.stderr
    done = nbdmirror("complete", "--qmp", server.qmp_path)
    assert done.returncode == 0, done.stderr
    identical(disk, target.image)
    server.stop()
    assert {path.name for path in server.state.iterdir()} >= {f"{name}.pivoted"}


def test_an_empty_disk_is_served_with_a_word(start: Start, folder: Path) -> None:
    server = start(Nbdmirror(folder, make_image(folder / "empty.img", 0), bare=True))
    assert "empty.img: has 0 bytes" in server.stderr
    assert server.qmp.execute("query-block")[0]["inserted"]["image"]["virtual-size"] == 0


@pytest.mark.parametrize(
    ("uri", "words"),
    [("nbd+unix:///?socket=/nope", "/nope: No such file")]
    + [(f"nbd://{host}/", f"'{host}' is no name of a host") for host in ("a..b", ".", "a" * 64)],
    ids=["no socket", "an empty label", "a dot", "a long label"],
)
def test_in_the_background_a_target_that_is_not_there_gets_a_word(
    folder: Path, uri: str, words: str
) -> None:
    disk = make_image(folder / "disk.img", MiB)
    where = ("--socket", folder / "s", "--qmp", folder / "q", "--daemonize", "--pidfile")
    done = nbdmirror("serve", disk, *where, folder / "pid", "--mirror-to", uri)
    try:
        assert done.returncode == 0, done.stderr
        # This machine may have no syslog, which is another warning.
        (warning,) = [line for line in done.stderr.splitlines() if "/dev/log" not in line]
        assert warning.startswith("nbdmirror: warning: --mirror-to ") and words in warning
    finally:
        os.kill(int((folder / "pid").read_text()), 15)
        wait_until(lambda: not (folder / "q").exists(), "it ends")
