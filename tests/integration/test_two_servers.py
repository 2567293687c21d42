"""Two nbdmirrors of one host: what one of them writes to, as a disk or as a target, the other one
refuses as a target and as a disk, by whatever way it comes there. And mirrors do not go round."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import pytest
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_image, make_noise
from support.kept import Kept, refusal
from support.mounts import loop_device
from support.processes import nbdmirror_environment, run
from support.servers import NbdkitTarget, Nbdmirror, OnTcp, QemuNbd
from support.waiting import WAIT_S_MAX, wait_until

from nbdmirror.layers import Layer
from nbdmirror.nbdclient import reservations

SIZE = 4 * MiB
MIRROR = {"sync": "full", "mode": "existing"}


@pytest.fixture
def one(start: Start, folder: Path) -> Nbdmirror:
    return start(Nbdmirror(folder, f"vda={make_image(folder / 'one.img', SIZE)}"))


@pytest.fixture
def other(start: Start, folder: Path) -> Nbdmirror:
    return start(Nbdmirror(folder, f"vdb={make_image(folder / 'other.img', SIZE, 2)}"))


UNSEEN = "is in use by another nbdmirror, whose process is not seen from here"
SMALL_PROC = ("unshare", "-m", "sh", "-c", 'mount -t proc -o subset=pid p /proc && exec "$@"', "sh")
ASK = """
import sys
from nbdmirror.errors import ConfigError
from nbdmirror.nbdclient.reservations import reserve
try:
    reserve(sys, {sys.argv[1]}, "it")
    print("taken", flush=True)
except ConfigError as error:
    print(error, flush=True)
sys.stdin.read()
"""


def used_by(server: Nbdmirror) -> str:
    return f"is in use by process {server.pid}, another nbdmirror"


def refused(server: Nbdmirror, target: str) -> str:
    name = server.disks[0].partition("=")[0]
    return server.qmp.refusal("drive-mirror", device=name, target=target, **MIRROR)


Ways = Callable[[Start, Path, Path], tuple[str, str]]


def the_same(start: Start, folder: Path, image: Path) -> tuple[str, str]:
    server = start(QemuNbd(folder, image))
    return server.uri(), server.uri()


def by_tcp(start: Start, folder: Path, image: Path) -> tuple[str, str]:
    server = start(OnTcp(folder, image))
    return server.uri(), server.uri(host="localhost")


def two_names(start: Start, folder: Path, image: Path) -> tuple[str, str]:
    server = start(NbdkitTarget(folder, "file", str(image)))
    return server.uri(), server.uri("other")


def two_servers(start: Start, folder: Path, image: Path) -> tuple[str, str]:
    first, second = (start(NbdkitTarget(folder, "file", str(image))) for _ in range(2))
    return first.uri(), second.uri()


def another_nbdmirror(start: Start, folder: Path, image: Path) -> tuple[str, str]:
    server = Nbdmirror(folder, f"vdt={image}")
    server.layer = 0
    start(server)
    return server.uri(), server.uri("vdt")


@pytest.mark.parametrize("ways", [the_same, by_tcp, two_names, two_servers, another_nbdmirror])
def test_one_target_of_two_mirrors(
    start: Start, identical: Identical, one: Nbdmirror, other: Nbdmirror, ways: Ways
) -> None:
    """From the first one's start on, over its pivot, and as long as its disk is there."""
    image = make_noise(one.folder / "target.img", SIZE)
    here, there = ways(start, one.folder, image)
    one.qmp.start_mirror(here, device="vda")
    one.qmp.wait_ready()
    assert used_by(one) in refused(other, there)
    one.qmp.complete()
    assert used_by(one) in refused(other, there)
    identical(one.folder / "one.img", image)


@pytest.mark.parametrize("end", ["cancel", "failure", "kill"])
def test_a_target_is_free_again(
    start: Start, identical: Identical, one: Nbdmirror, other: Nbdmirror, end: str
) -> None:
    target = start(QemuNbd(one.folder, make_noise(one.folder / "target.img", SIZE)))
    one.qmp.start_mirror(target.uri(), device="vda")
    assert used_by(one) in refused(other, target.uri())
    if end == "kill":
        one.kill()
    elif end == "cancel":
        one.qmp.execute("block-job-cancel", device="j", force=True)
        one.qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    else:
        one.allowed.append("lost|broken|failed")
        target.kill()
        one.qmp.wait_for_event("BLOCK_JOB_COMPLETED")
        target.start()
    other.qmp.start_mirror(target.uri(), device="vdb")
    other.qmp.wait_ready()
    other.qmp.complete()
    identical(one.folder / "other.img", target.image)


@pytest.mark.parametrize(
    ("inside", "is_seen"),
    [
        (("unshare", "--user", "--map-root-user"), False),
        (("unshare", "--user"), False),
        (SMALL_PROC, True),
    ],
    ids=["users of its own", "a user without a number", "a smaller /proc"],
)
def test_processes_that_do_not_see_each_other(
    start: Start, identical: Identical, folder: Path, inside: tuple[str, ...], is_seen: bool
) -> None:
    """As services and containers are made."""
    if run(*inside, "true", check=False).returncode:
        pytest.skip(f"not possible here: {inside}")
    target = start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))
    one, other = (Nbdmirror(folder, f"{name}={make_image(folder / name, SIZE)}") for name in "ab")
    for server in (one, other):
        server.inside = inside
        start(server)
    one.qmp.start_mirror(target.uri(), device="a")
    one.qmp.wait_ready()
    for _ in range(3):
        assert (used_by(one) if is_seen else UNSEEN) in refused(other, target.uri())
    one.qmp.complete()
    assert (used_by(one) if is_seen else UNSEEN) in refused(other, target.uri())
    identical(folder / "a", target.image)


@pytest.mark.parametrize(
    ("holder", "asker", "inside", "counts"),
    [
        (1, 1, (), True),
        (1, 2, (), False),
        (1, 0, (), True),
        (1, 0, ("unshare", "--pid", "--fork", "--mount-proc"), True),
        (0, 1, (), True),
        (0, 1, ("unshare", "--user", "--map-user=1"), True),
    ],
)
def test_whose_reservations_count(
    folder: Path, holder: int, asker: int, inside: tuple[str, ...], counts: bool
) -> None:
    """One's own and root's; and for root everybody's. The process need not be seen, and root may
    have no number."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")

    def asking(user: int, *inside: str) -> list[str]:
        who = ("setpriv", "--clear-groups", f"--reuid={user}", f"--regid={user}")
        return [*who, *inside, "/usr/bin/python3", "-c", ASK, str(folder)]

    if run(*asking(1), check=False).returncode:
        pytest.skip("the checkout is not readable for other users")
    if run(*inside, "true", check=False).returncode:
        pytest.skip(f"not possible here: {inside}")
    with subprocess.Popen(
        asking(holder), stdin=PIPE, stdout=PIPE, text=True, env=nbdmirror_environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        said = run(*asking(asker, *inside)).stdout
    assert said.startswith("it is in use by") is counts, said


def test_a_server_takes_the_questions_of_others(one: Nbdmirror) -> None:
    """Otherwise there would be no room for more of them."""
    (place,) = reservations.places_of_file((one.folder / "one.img").stat())
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as question:
            question.settimeout(WAIT_S_MAX)
            question.connect(f"\0{reservations._name_of(place)}")
            assert question.recv(1) == b""


def test_a_holder_that_answers_nobody_counts(folder: Path) -> None:
    place = str(folder)
    with socket.socket(socket.AF_UNIX) as holder, socket.socket(socket.AF_UNIX) as first:
        holder.bind(f"\0{reservations._name_of(place)}")
        holder.listen(0)
        first.connect(holder.getsockname())
        assert reservations._counts(reservations._name_of(place))


def test_two_exports_of_one_server(
    start: Start, identical: Identical, one: Nbdmirror, other: Nbdmirror
) -> None:
    """They are two."""
    images = [make_noise(one.folder / f"t{name}.img", SIZE) for name in "ab"]
    both = Nbdmirror(one.folder, *(f"{path.stem}={path}" for path in images))
    both.layer = 0
    start(both)
    for server, device, image in ((one, "vda", images[0]), (other, "vdb", images[1])):
        server.qmp.start_mirror(both.uri(image.stem), device=device)
        server.qmp.wait_ready()
        server.qmp.complete()
    identical(one.folder / "one.img", images[0])
    identical(one.folder / "other.img", images[1])


def test_a_target_that_is_another_servers_disk(start: Start, one: Nbdmirror, folder: Path) -> None:
    """By way of a server that takes no locks; and the disk of an NBD server."""
    image = make_image(folder / "two.img", SIZE, 3)
    lender = start(QemuNbd(folder, image))
    other = start(Nbdmirror(folder, f"vdb={lender.uri()}"))
    assert used_by(other) in refused(one, lender.uri())
    by_file = start(NbdkitTarget(folder, "file", str(folder / "one.img")))
    assert used_by(one) in refused(other, by_file.uri())
    assert_identical(make_image(folder / "again.img", SIZE), folder / "one.img")


def test_one_disk_of_two_servers(
    start: Start, one: Nbdmirror, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file and its loop device, in both orders. An export has two while a guest moves."""
    with loop_device(folder / "one.img") as device:
        assert used_by(one) in refusal(Nbdmirror(folder, f"vdb={device}"))
    image = make_image(folder / "two.img", SIZE)
    with loop_device(image) as device, Nbdmirror(folder, f"vdb={device}") as other:
        assert used_by(other) in refusal(Nbdmirror(folder, f"vdc={image}"))
    lender = start(QemuNbd(folder, image))
    with Nbdmirror(folder, f"vdb={lender.uri()}") as other:
        with Nbdmirror(folder, f"vdc={lender.uri()}") as next_one:
            assert f"warning: '{lender.uri()}' {used_by(other)}" in next_one.stderr
        with Nbdmirror(folder, lender.uri(), options=("--read-only",)) as reader:
            assert reader.is_ready()


def test_two_parts_of_one_file(start: Start, folder: Path) -> None:
    """As partitions are: each is a disk of its own."""
    image = make_image(folder / "both.img", 2 * SIZE)
    with (
        loop_device(image, sizelimit=SIZE) as first,
        loop_device(image, offset=SIZE) as second,
        Nbdmirror(folder, f"vda={first}") as one,
        Nbdmirror(folder, f"vdb={second}") as other,
    ):
        assert one.is_ready() and other.is_ready()


def test_a_mirror_that_continues_and_finds_its_target_taken(
    start: Start, identical: Identical, other: Nbdmirror, folder: Path
) -> None:
    """It is not written to, until it is free again, and the same as it was."""
    target = start(QemuNbd(folder, make_noise(folder / "target.img", SIZE)))
    one = Kept(folder, make_image(folder / "one.img", SIZE))
    one.allowed.append("in use|is lost|came back")
    start(one)
    one.qmp.start_mirror(target.uri(), device="vda")
    one.qmp.wait_ready()
    one.kill()
    other.qmp.start_mirror(target.uri(), device="vdb")
    other.qmp.wait_ready()
    one.start()
    with Guest(one.uri("vda"), folder / "one.img") as guest:
        wait_until(lambda: used_by(other) in one.stderr, "it is told")
        guest.wait_for_requests(20)
        other.qmp.complete()
    one.qmp.execute("block-job-cancel", device="j", force=True)
    one.qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    identical(folder / "other.img", target.image)


def test_a_ring(start: Start, identical: Identical, one: Nbdmirror, other: Nbdmirror) -> None:
    """Each is the other one's target, or there is a third one between them; a chain is none."""
    third = start(Nbdmirror(one.folder, f"vdc={make_noise(one.folder / 'third.img', SIZE)}"))
    one.layer, other.layer = 3, 2
    one.qmp.start_mirror(other.uri("vdb"), device="vda")
    one.qmp.wait_ready()
    assert "'vdb', or is mirrored to that" in failed(other, "vdb", one.uri("vda"))
    other.qmp.start_mirror(third.uri("vdc"), device="vdb", job_id="k")
    other.qmp.wait_ready("k")
    assert "'vdc', or is mirrored to that" in failed(third, "vdc", one.uri("vda"))
    one.qmp.complete()
    assert "'vdc', or is mirrored to that" in failed(third, "vdc", one.uri("vda")), "it is there"
    other.qmp.complete("k")
    identical(one.folder / "one.img", one.folder / "other.img")
    identical(one.folder / "one.img", one.folder / "third.img")


def failed(server: Nbdmirror, device: str, target: str) -> str:
    """Why the mirror has failed, before anything was written."""
    server.allowed.append("leads back")
    server.qmp.start_mirror(target, device=device)
    server.qmp.wait_for_event("BLOCK_JOB_COMPLETED", device="j")
    server.qmp.forget()
    return str(server.qmp.disk()["last-job"]["reason"])


def test_nothing_is_kept_of_a_reservation() -> None:
    """Parts of a device are no whole; each owner gives up its own, once or twice."""
    first, second = object(), object()
    layers = [Layer(("device", 7, 0)), Layer(("file", 1, 2), (0.0, 4096.0))]
    places = set(reservations._places_of_layers(layers))
    assert places == {"storage ('device', 7, 0)"}
    here = {f"{place} of {os.getpid()}" for place in places}
    reservations.reserve(first, here, "it")
    reservations.reserve(second, here, "it")
    reservations.release(first)
    reservations.release(first)
    assert [owners for _, owners in reservations._held.values()] == [{id(second)}]
    reservations.release(second)
    assert not reservations._held
