"""Things are what they are, not how they are spelt: files, block devices and NBD exports under
several names."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Start
from support.images import MiB, assert_identical, make_image
from support.kept import refusal
from support.mounts import loop_device
from support.servers import NbdkitTarget, Nbdmirror, OnTcp, QemuNbd

from nbdmirror import syscalls as linux
from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import ConfigError
from nbdmirror.identity import SERVER_ID, Peer, Same, label, same_place
from nbdmirror.names import DISK_LENGTH_MAX, default_job_id, is_wellformed_id, split_disk
from nbdmirror.nbdclient.device import NbdDevice

YES, NO, UNKNOWN = Same.YES, Same.NO, Same.UNKNOWN


@pytest.mark.parametrize(
    ("one", "other", "answer"),
    [
        ("nbd://host", "nbd://HOST:10809/", YES),
        ("nbd://host./", "nbd://host/", YES),
        ("nbd://host/vda", "nbds://host/vda?tls-certificates=/etc/pki", YES),
        ("nbd://host/vda", "NBD://host/%76%64%61", YES),
        ("nbd://[::1]:1234/a%20b", "nbd://[0:0::1]:1234/a b", YES),
        ("nbd://h/a%2fb", "nbd://h/a/b", YES),
        ("nbd://h/a+b", "nbd://h/a%2Bb", YES),
        ("nbd://h/a+b", "nbd://h/a%20b", UNKNOWN),
        ("nbd://127.0.0.1/", "nbd://[::ffff:127.0.0.1]/", YES),
        ("nbd://127.0.0.1/", "nbd://127.1/", YES),
        ("nbd://127.0.0.1/", "nbd:127.0.0.1:10809", YES),
        ("nbd://[fe80::1%25lo]/", "nbd://[FE80::0001%251]/", YES),
        ("nbd://[fe80::1%25lo]/", "nbd://[fe80::1%252]/", UNKNOWN),
        ("nbd+vsock://2/", "nbd+vsock://2:10809/", YES),
        ("nbd+vsock://2/", "nbd+vsock://3/", NO),
        ("nbd+unix:///?socket=/run/a", "nbds+unix:///?socket=/run/../run//a", YES),
        ("nbd+unix:///?socket=/run/a", "nbd+unix:///?socket=/run%2fa", YES),
        ("nbd://host/vda", "nbd://host/vdb", UNKNOWN),
        ("nbd://host/vda", "nbd://10.0.0.1/vda", UNKNOWN),
        ("nbd://host/vda", "nbd+unix:///vda?socket=/run/a", UNKNOWN),
        ("nbd://host:1/vda", "nbd://host/vda", NO),
        ("nbd+unix:///?socket=/nowhere/a", "nbd+unix:///?socket=/nowhere/b", UNKNOWN),
        ("nbd://host:port/", "nbd://host:port/", YES),
        ("nbd://host:port/", "nbd://host:harbour/", UNKNOWN),
        ("/srv/disk", "/srv/disk", YES),
        ("/srv/disk", "nbd://srv/disk", UNKNOWN),
    ],
)
def test_names_alone(one: str, other: str, answer: Same) -> None:
    assert same_place(one, other) is same_place(other, one) is answer


def test_addresses_are_looked_up_only_where_that_may_take_time() -> None:
    name, address = "nbd://localhost/x", "nbd://127.0.0.1/x"
    assert same_place(name, address) is UNKNOWN
    found = {info[4][0] for info in socket.getaddrinfo("localhost", None)}
    assert "127.0.0.1" in found
    assert same_place(address, name, resolves=True) is YES
    expected = YES if found == {"127.0.0.1"} else UNKNOWN
    assert same_place(name, address, resolves=True) is expected, "it may lead to ::1"
    assert same_place("nbd://nosuch.invalid/", address, resolves=True) is UNKNOWN


def test_names_are_compared_without_a_look_at_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*_: object, **__: object) -> None:
        raise AssertionError("a file system may not answer")

    disk, link = make_image(tmp_path / "disk", MiB), tmp_path / "link"
    link.symlink_to(disk)
    names = str(disk), str(link)
    uris = [f"nbd+unix:///x?socket={name}" for name in names]
    assert same_place(*names) is same_place(*uris) is YES
    monkeypatch.setattr(os, "stat", look)
    monkeypatch.setattr(os, "lstat", look)
    for one, other in (names, uris):
        assert same_place(one, one, looks=False) is YES
        assert same_place(one, other, looks=False) is UNKNOWN


def test_a_file_under_several_names(tmp_path: Path) -> None:
    disk, other = make_image(tmp_path / "disk", MiB), make_image(tmp_path / "other", MiB)
    hard, soft = tmp_path / "hard", tmp_path / "soft"
    hard.hardlink_to(disk)
    soft.symlink_to("hard")
    (tmp_path / "folder").symlink_to(tmp_path)
    for name in (hard, soft, f"{tmp_path}//disk", tmp_path / "folder" / ".." / tmp_path / "disk"):
        assert same_place(str(disk), str(name)) is YES
        assert same_place(str(other), str(name)) is NO
    for name in ("hard", "soft"):
        uris = [f"nbd+unix:///x?socket={tmp_path}/{one}" for one in ("disk", name)]
        assert same_place(*uris) is YES, "a socket is a file as well"
    assert same_place(str(disk), str(tmp_path / "gone")) is UNKNOWN


def test_a_block_device_under_several_names(tmp_path: Path) -> None:
    """Its number is what counts: for who is told apart, and for locks."""
    one, other = (loop_device(make_image(tmp_path / name, MiB)) for name in "ab")
    with one as first, other as second:
        number = os.stat(first).st_rdev
        node, link = tmp_path / "node", tmp_path / "link"
        os.mknod(node, stat.S_IFBLK | 0o600, number)
        link.symlink_to(first)
        for name in (node, link):
            assert same_place(str(first), str(name)) is YES
            assert same_place(str(second), str(name)) is NO
        assert linux.node_of(number) == str(first)
        served = FileDevice.open(str(first))
        for name in (node, link):
            with pytest.raises(ConfigError, match="in use by another"):
                FileDevice.open(str(name))
        served.close()
        by_node = FileDevice.open(str(node))
        with pytest.raises(ConfigError, match="in use by another"):
            FileDevice.open(str(first))
        by_node.close()


def peer(server: tuple[object, ...], export: str = "", process: int = 0, label: str = "") -> Peer:
    return Peer(server, process, export, label)


@pytest.mark.parametrize(
    ("one", "other", "answer"),
    [
        (peer(("h", 1), "a"), peer(("h", 1), "a"), YES),
        (peer(("h", 1), "a"), peer(("h", 1), "b"), UNKNOWN),
        (peer(("h", 1), "a"), peer(("i", 1), "a"), UNKNOWN),
        (peer((1, 2), "a", 7), peer((1, 3), "a", 8), NO),
        (peer((1, 2), "a", 7), peer((1, 3), "a", 7), UNKNOWN),
        (peer((1, 2), "a", 7, "nbdmirror x a"), peer(("h", 1), "", 0, "nbdmirror x a"), YES),
        (peer((1, 2), "a", 7, "nbdmirror x a"), peer((1, 2), "b", 7, "nbdmirror x b"), NO),
    ],
)
def test_exports_that_are_connected(one: Peer, other: Peer, answer: Same) -> None:
    assert one.same(other) is other.same(one) is answer


def test_exports_of_real_servers(start: Start, folder: Path) -> None:
    """The names of a socket, the default export's second name, and two servers that differ in
    nothing that a client has written."""
    one = start(QemuNbd(folder, make_image(folder / "a.img", MiB), shared=8))
    other = start(QemuNbd(folder, make_image(folder / "b.img", MiB), shared=8))
    hard, soft = folder / "hard", folder / "soft"
    hard.hardlink_to(one.socket)
    soft.symlink_to(one.socket)
    names = [one.uri(), f"nbd+unix:///?socket={hard}", f"nbd+unix:///?socket={soft}"]
    devices = [NbdDevice.open(name) for name in (*names, other.uri())]
    *same, different = devices
    for device in same:
        assert device.is_same_export(same[0]) and same[0].is_same_export(device)
        assert not device.is_same_export(different) and not device.is_own_export()
    for device in devices:
        device.close()


def test_a_server_with_several_addresses(start: Start, folder: Path) -> None:
    one, other = (start(OnTcp(folder, make_image(folder / name, MiB))) for name in "ab")
    hosts = ("127.0.0.1", "127.0.0.2", "[::ffff:127.0.0.1]", "127.1")
    devices = [NbdDevice.open(one.uri(host=host)) for host in hosts]
    different = NbdDevice.open(other.uri())
    for device in devices:
        assert device.is_same_export(devices[0])
        assert not device.is_same_export(different)
    for device in (*devices, different):
        device.close()


def test_our_exports_say_who_they_are(start: Start, folder: Path) -> None:
    """Whatever leads there: the default export's second name, or a forwarder in between."""
    disks = {name: make_image(folder / f"{name}.img", MiB) for name in ("vda", "vdb")}
    server = start(Nbdmirror(folder, *(f"{name}={path}" for name, path in disks.items())))
    default, vda, vdb = (NbdDevice.open(server.uri(name)) for name in ("", "vda", "vdb"))
    assert default.is_same_export(vda) and not vda.is_same_export(vdb)
    assert not vda.is_own_export()
    text = server.qmp.refusal(
        "drive-mirror", device="vda", target=server.uri("vdb"), sync="full", mode="existing"
    )
    assert "is an export of this server itself" in text
    for device in (default, vda, vdb):
        device.close()
    with connected(server.uri("vda")) as guest:
        assert guest.get_size() == MiB
    assert label("x") == f"nbdmirror {SERVER_ID} x"


def test_a_target_that_is_the_disks_own_file(start: Start, folder: Path) -> None:
    """By a server that knows nothing of image locks: what guests write meanwhile would be lost."""
    disk = make_image(folder / "disk.img", MiB)
    other = make_image(folder / "other.img", MiB)
    server = start(Nbdmirror(folder, disk))
    mirror = {"device": "disk0", "sync": "full", "mode": "existing"}
    same = start(NbdkitTarget(folder, "file", str(disk)))
    text = server.qmp.refusal("drive-mirror", target=same.uri(), **mirror)
    assert f"writes to '{disk}' itself" in text
    backing = start(NbdkitTarget(folder, "file", str(other), "fadvise=normal"))
    server.qmp.execute("drive-mirror", target=backing.uri(), **mirror)
    server.qmp.wait_ready("disk0")
    server.qmp.complete("disk0")
    assert_identical(disk, other)


@pytest.mark.slow
@pytest.mark.parametrize("is_tcp", [False, True])
@pytest.mark.parametrize("name", ["itself", "symlink", "hard link", "loop device", "below a loop"])
def test_a_target_that_is_the_disks_own_file_by_another_name(
    folder: Path, name: str, is_tcp: bool
) -> None:
    disk = make_image(folder / "disk.img", MiB)
    link, hard = folder / "link.img", folder / "hard.img"
    link.symlink_to(disk)
    hard.hardlink_to(disk)
    with loop_device(disk) if "loop" in name else nullcontext(str(disk)) as loop:
        served, other = {
            "itself": (disk, disk),
            "symlink": (link, disk),
            "hard link": (disk, hard),
            "loop device": (disk, Path(loop)),
            "below a loop": (Path(loop), disk),
        }[name]
        same = OnTcp(folder, other) if is_tcp else NbdkitTarget(folder, "file", str(other))
        with Nbdmirror(folder, served) as server, same:
            text = server.qmp.refusal(
                "drive-mirror", device="disk0", target=same.uri(), sync="full", mode="existing"
            )
    assert f"writes to '{served}' itself" in text


def test_one_export_is_not_two_disks(start: Start, folder: Path) -> None:
    behind = start(QemuNbd(folder, make_image(folder / "a.img", MiB), shared=8))
    link = folder / "link"
    link.symlink_to(behind.socket)
    disks = [f"a={behind.uri()}", f"b=nbd+unix:///?socket={link}"]
    assert "is the same export as disk 'a'" in refusal(Nbdmirror(folder, *disks))


# Names.


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("vda=/x", ("vda", "/x")),
        ("1=/x=y", ("1", "/x=y")),
        ("/x", ("", "/x")),
        ("./a=b", ("", "./a=b")),
        ("my disk=/x", ("", "my disk=/x")),
        ("a/b=/x", ("", "a/b=/x")),
        ("vda=", ("vda", "")),
        ("nbd:h:1:exportname=x", ("", "nbd:h:1:exportname=x")),
        ("NBD+unix:///?socket=/x", ("", "NBD+unix:///?socket=/x")),
        ("nbd+x=y:1", ("", "nbd+x=y:1")),
        ("nbd=nbds://h/?tls-psk-file=/k", ("nbd", "nbds://h/?tls-psk-file=/k")),
    ],
)
def test_name_and_disk(text: str, parts: tuple[str, str]) -> None:
    assert split_disk(text) == parts


def test_every_disk_has_a_name_for_its_job() -> None:
    disks = ["vda", "1", "job-1", "3f2a77c0-7d1e-4c6b-9b1d-0c0ffee00001", "9" * DISK_LENGTH_MAX]
    ids = [default_job_id(disk, disks) for disk in disks]
    assert all(map(is_wellformed_id, ids)) and len(set(ids)) == len(disks)
    assert ids[:3] == ["vda", "job-job-1", "job-1"]
    assert max(map(len, ids)) <= 255
