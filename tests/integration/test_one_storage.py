"""Servers of this host, and the ways to them, that lead to one storage: no two disks, and no disk
and its target, are there. What is the same is found by what the servers have open."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.fixtures import Start
from support.images import MiB, assert_identical, make_empty, make_noise
from support.kept import refusal
from support.knownservers import NbdServer
from support.mounts import loop_device
from support.processes import free_port, nbdmirror, patched
from support.serverprocess import Server
from support.servers import NbdkitTarget, Nbdmirror, QsdTarget
from support.waiting import wait_until

from nbdmirror.identity import Peer, Same
from nbdmirror.layers import Layer
from nbdmirror.local_servers import Storage, holders, is_one, sole, written_by

SIZE = MiB
MIRROR = {"sync": "full", "mode": "existing"}


class OnAllAddresses(NbdkitTarget):
    """nbdkit as it is without -i: a listening socket for each family."""

    def __init__(self, folder: Path, image: Path, *more: str) -> None:
        self.port = free_port()
        super().__init__(folder, "file", str(image), *more)

    def argv(self) -> list[str]:
        return [*super().argv()[:2], "-p", str(self.port), *super().argv()[4:]]

    def uri(self, export: str = "", host: str = "127.0.0.1") -> str:
        return f"nbd://{host}:{self.port}/{export}"


class Activated(OnAllAddresses):
    """nbdkit on a Unix socket and on TCP at once, as systemd starts it."""

    def argv(self) -> list[str]:
        listen = ["-l", f"127.0.0.1:{self.port}", "-l", str(self.socket)]
        return ["systemd-socket-activate", *listen, "nbdkit", "-f", *super().argv()[4:]]

    def check_end(self, code: int) -> None:
        pass  # before the first client it is not nbdkit yet


class InContainer(OnAllAddresses):
    """The same in a network of its own, with addresses that no test beside this one has."""

    subnet = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
    address = f"{subnet}.2"

    @contextmanager
    def network(self) -> Iterator[None]:
        name = f"nbdm-{os.getpid()}"
        here, there = f"nbdm{os.getpid() % 10**6}a", f"nbdm{os.getpid() % 10**6}b"
        steps = [
            f"ip netns add {name}",
            f"ip link add {here} type veth peer name {there} netns {name}",
            f"ip address add {self.subnet}.1/30 dev {here}",
            f"ip link set {here} up",
            f"ip -n {name} address add {self.address}/30 dev {there}",
            f"ip -n {name} link set {there} up",
        ]
        self.inside = ("ip", "netns", "exec", name)
        try:
            for step in steps:
                try:
                    subprocess.run(step.split(), check=True, capture_output=True)
                except (OSError, subprocess.CalledProcessError) as error:
                    pytest.skip(f"no network namespaces here: {error}")
            yield
        finally:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def uri(self, export: str = "", host: str = address) -> str:
        return super().uri(export, host)


def two_disks(start: Start, folder: Path) -> Nbdmirror:
    disks = (make_noise(folder / f"{name}.img", SIZE, seed) for seed, name in enumerate("ab"))
    return start(Nbdmirror(folder, *(f"vd{path.name[0]}={path}" for path in disks)))


def refused(server: Nbdmirror, device: str, uri: str) -> str:
    return server.qmp.refusal("drive-mirror", device=device, target=uri, **MIRROR)


def test_a_target_that_is_another_disk_of_the_server(start: Start, folder: Path) -> None:
    server = two_disks(start, folder)
    before = (folder / "b.img").read_bytes()
    target = start(NbdkitTarget(folder, "file", str(folder / "b.img")))
    text = refused(server, "vda", target.uri())
    assert f"its server writes to '{folder}/b.img', which is 'vdb'" in text
    assert (folder / "b.img").read_bytes() == before


Targets = Callable[[Start, Path, Path], tuple[str, str]]


def two_servers(start: Start, folder: Path, image: Path) -> tuple[str, str]:
    one, other = (start(NbdkitTarget(folder, "file", str(image))) for _ in range(2))
    return one.uri(), other.uri()


def two_families(start: Start, folder: Path, image: Path) -> tuple[str, str]:
    server = start(OnAllAddresses(folder, image))
    return server.uri(), server.uri(host="[::1]")


def unix_and_tcp(start: Start, folder: Path, image: Path) -> tuple[str, str]:
    server = start(Activated(folder, image))
    return Server.uri(server), server.uri()


def two_names(start: Start, folder: Path, image: Path) -> tuple[str, str]:
    """nbdkit's file plugin has the same disk under every name."""
    server = start(NbdkitTarget(folder, "file", str(image)))
    return server.uri(), server.uri("other")


@pytest.mark.parametrize("ways", [two_servers, two_families, unix_and_tcp, two_names])
def test_one_storage_is_not_two_targets(start: Start, folder: Path, ways: Targets) -> None:
    server = two_disks(start, folder)
    image = make_empty(folder / "target.img", SIZE)
    one, other = ways(start, folder, image)
    server.qmp.execute("drive-mirror", device="vda", target=one, **MIRROR)
    server.qmp.wait_ready("vda")
    assert "is in use" in refused(server, "vdb", other)
    server.qmp.complete("vda")
    assert "is in use: 'vda' is the same export" in refused(server, "vdb", other)
    assert_identical(folder / "a.img", image)
    server.stop()
    text = refusal(Nbdmirror(folder, f"vda={one}", f"vdb={other}"))
    assert "is the same export as disk 'vda'" in text
    server = start(Nbdmirror(folder, f"vda={one}"))
    assert f"Target '{other}' is the disk itself" in refused(server, "vda", other)


def test_a_loop_device_over_a_target(start: Start, folder: Path) -> None:
    server = two_disks(start, folder)
    image = make_empty(folder / "target.img", SIZE)
    with loop_device(image) as loop:
        one, other = (NbdkitTarget(folder, "file", str(path)) for path in (image, loop))
        with one, other:
            server.qmp.execute("drive-mirror", device="vda", target=one.uri(), **MIRROR)
            server.qmp.wait_ready("vda")
            assert "is in use" in refused(server, "vdb", other.uri())
            server.qmp.complete("vda")
            server.stop()
    assert_identical(folder / "a.img", image)


@pytest.mark.parametrize("kind", [OnAllAddresses, InContainer, NbdServer])
def test_servers_of_the_disks_own_file(start: Start, folder: Path, kind: type[Server]) -> None:
    """nbd-server opens the file in a process for each client."""
    server = two_disks(start, folder)
    disk = folder / "a.img"
    if kind is InContainer:
        target = InContainer(folder, disk)
        with target.network(), target:
            text = refused(server, "vda", target.uri())
    elif kind is NbdServer:
        text = refused(server, "vda", start(NbdServer(folder, disk, "flush")).uri())
    else:
        text = refused(server, "vda", start(OnAllAddresses(folder, disk)).uri(host="localhost"))
    assert f"writes to '{disk}' itself" in text


def test_a_file_and_an_export_of_the_file_are_not_two_disks(start: Start, folder: Path) -> None:
    disk = make_empty(folder / "disk.img", SIZE)
    export = start(NbdkitTarget(folder, "file", str(disk)))
    for disks in ((f"a={disk}", f"b={export.uri()}"), (f"a={export.uri()}", f"b={disk}")):
        assert "shares storage with disk 'a'" in refusal(Nbdmirror(folder, *disks))


def test_an_image_and_a_journal_are_two_disks(start: Start, folder: Path) -> None:
    disk = make_empty(folder / "disk.img", 32 * MiB)
    one, other = (start(NbdkitTarget(folder, "file", str(disk))) for _ in range(2))
    with loop_device(disk) as loop:
        for image, journal in ((disk, loop), (loop, disk), (one.uri(), other.uri())):
            done = nbdmirror("recover", "--image", image, "--journal", journal)
            assert (done.returncode, "is the same disk as" in done.stderr) == (1, True), done.stderr
    server = start(Nbdmirror(folder, f"vda={make_noise(folder / 'a.img', 32 * MiB)}"))
    points = {"copy_mode": "points", "x_nbdmirror_journal": other.uri()}
    text = server.qmp.refusal("drive-mirror", device="vda", target=one.uri(), **MIRROR, **points)
    assert "is the target itself" in text


def test_what_may_be_two_disks_is_taken(start: Start, folder: Path) -> None:
    """One server with two exports of one size, and a server of two parts of a file."""
    server = two_disks(start, folder)
    images = [make_empty(folder / f"{name}.img", SIZE) for name in ("one", "other")]

    class TwoExports(QsdTarget):
        def argv(self) -> list[str]:
            more = f"driver=file,node-name=more,filename={images[1]},discard=unmap"
            export = "type=nbd,id=export1,node-name=more,name=more,writable=on"
            return [*super().argv(), "--blockdev", more, "--export", export]

    target = start(TwoExports(folder, images[0]))
    for device, export in (("vda", "disk"), ("vdb", "more")):
        server.qmp.execute("drive-mirror", device=device, target=target.uri(export), **MIRROR)
        server.qmp.wait_ready(device)
        server.qmp.complete(device)
    server.stop()
    for name, image in zip("ab", images, strict=True):
        assert_identical(folder / f"{name}.img", image)
    both = make_empty(folder / "both.img", 2 * SIZE)
    parts = [
        start(
            NbdkitTarget(
                folder, "file", str(both), f"offset={at}", f"range={SIZE}", filters=("offset",)
            )
        )
        for at in (0, SIZE)
    ]
    server = start(Nbdmirror(folder, f"vda={folder}/a.img", f"vdb={folder}/b.img"))
    for device, part in zip(("vda", "vdb"), parts, strict=True):
        server.qmp.execute("drive-mirror", device=device, target=part.uri(), **MIRROR)
        server.qmp.wait_ready(device)
        server.qmp.complete(device)
    server.stop()
    assert both.read_bytes() == b"".join((folder / f"{name}.img").read_bytes() for name in "ab")


def test_what_a_process_has_open(tmp_path: Path) -> None:
    """Logs and what is only read count for no export. An image may be open twice, in any way."""
    image = make_empty(tmp_path / "image", SIZE)
    with image.open("r+b"), image.open("rb"), (tmp_path / "log").open("wb"):
        code = f"j, k = open('{image}', 'ab'), open('{image}', 'rb'); "
        code += "import sys; print(flush=True); sys.stdin.read()"
        command = [
            "python3",
            "-c",
            f"i, l = open('{image}', 'r+b'), open('{tmp_path}/log', 'ab'); {code}",
        ]
        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null) as process:
            assert process.stdout is not None
            process.stdout.readline()
            found = written_by([process.pid])
            assert process.stdin is not None
            process.stdin.close()
    assert sorted((one.size, one.is_read) for one in found) == [(0, False), (SIZE, True)]
    status = image.stat()
    thing = ("file", status.st_dev, status.st_ino)
    image_found = sole(found, SIZE)
    assert image_found is not None and image_found.layers == [Layer(thing)]
    assert is_one(image_found, image_found)
    assert sole(found, 0) is None and not is_one(None, image_found)
    assert written_by([process.pid]) == [], "it has ended"


def test_two_of_one_size_are_not_told_apart() -> None:
    images = [Storage([Layer(("file", 1, inode))], SIZE, is_read=True) for inode in (1, 2)]
    assert sole(images, SIZE) is None
    assert sole(images[:1], SIZE) == images[0]
    assert not is_one(*images) and is_one(images[0], images[0])


def test_who_has_a_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        inode = os.fstat(listener.fileno()).st_ino
        assert holders([inode]) == {os.getpid()}
    assert holders([inode]) == holders([]) == frozenset()


def test_one_process_with_two_ports() -> None:
    """It may forward them to two servers."""
    one = Peer(("127.0.0.1", 1), 0, "", listeners=frozenset({5}), holders=frozenset({2**31}))
    other = Peer(("127.0.0.1", 2), 0, "", listeners=frozenset({6}), holders=frozenset({2**31}))
    assert one.same(other) is Same.UNKNOWN
    other = Peer(("::1", 1), 0, "", listeners=frozenset({6}), holders=frozenset({2**31}))
    assert one.same(other) is Same.YES


COUNTING = """
import nbdmirror.local_servers as servers

look = servers._look

def counted(processes):
    with open({notes!r}, "a") as notes:
        notes.write("look\\n")
    return look(processes)

servers._look = counted
"""


def test_a_server_is_looked_at_once_for_each_mirror(start: Start, folder: Path) -> None:
    """However many exports it has, and disks are mirrored to them: the event loop waits for it."""
    count, notes = 8, folder / "looks"
    (folder / "targets").mkdir()
    for number in range(count):
        make_empty(folder / "targets" / f"t{number}", SIZE)

    class Exporting(NbdkitTarget):
        def uri(self, export: str = "t0") -> str:
            return super().uri(export)

    target = start(Exporting(folder, "file", f"dir={folder / 'targets'}"))

    class Counting(Nbdmirror):
        def environment(self) -> dict[str, str]:
            code = COUNTING.format(notes=str(notes))
            return patched(super().environment(), self.folder, code)

    disks = [make_noise(folder / f"{number}.img", SIZE, number) for number in range(count)]
    server = start(Counting(folder, *(f"vd{path.stem}={path}" for path in disks)))
    for number in range(count):
        uri = target.uri(f"t{number}")
        server.qmp.execute("drive-mirror", device=f"vd{number}", target=uri, **MIRROR)

    def are_ready() -> bool:
        return all(job["ready"] for job in server.qmp.execute("query-block-jobs"))

    wait_until(are_ready, "all are ready")
    for number in range(count):
        server.qmp.complete(f"vd{number}")
        assert_identical(disks[number], folder / "targets" / f"t{number}")
    assert len(notes.read_text().splitlines()) == count
