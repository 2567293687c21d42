"""TLS towards guests, targets and sources: certificates, mutual too, and pre-shared keys; and each
way in which it fails, with the line that the user reads."""

from __future__ import annotations

import datetime as dt
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbd
import pytest
from clients import connected
from fixtures import Identical, Start
from guests import Guest
from images import MiB, assert_identical, make_image, make_noise
from keys import HERE, PAST, Authority, psk, until
from processes import ROOT, Finished, free_port, nbdmirror, run
from proxy import Proxy
from qmpclient import Qmp
from serverprocess import Server
from servers import NbdkitTarget, Nbdmirror, QemuNbd
from waiting import wait_until

from nbdmirror import tls
from nbdmirror.errors import ConfigError

SIZE = 4 * MiB
FIXED = "1.20.3"
"""A libnbd that verifies always."""

LIFE_S = 8
"""Of a certificate that is to expire during a test: long enough for the mirror to get ready."""


class Site:
    """Keys of a small site, as docs/tls.md makes them, and wrong ones."""

    def __init__(self, folder: Path) -> None:
        self.authority = ours = Authority(folder)
        other = Authority(folder, "other")
        self.server = ours.keys(folder / "server", "server", *HERE)
        self.client = ours.keys(folder / "client", "client")
        self.authority_alone = ours.directory(folder / "authority-alone")
        self.expired_server = ours.keys(folder / "expired-server", "server", *HERE, *PAST)
        self.expired_client = ours.keys(folder / "expired-client", "client", *PAST)
        self.elsewhere = ours.keys(folder / "elsewhere", "server", "dns_name = elsewhere.example")
        self.stranger = other.keys(folder / "stranger", "client")
        # Keys of a client of ours who believes another authority.
        self.misled = ours.keys(folder / "misled", "client")
        other.directory(self.misled)
        (folder / "psk").mkdir()
        self.psk = psk(folder / "psk" / "keys.psk", "alice")  # QEMU's name for it
        self.wrong_psk = psk(folder / "wrong.psk", "alice")
        self.unknown_psk = psk(folder / "unknown.psk", "bob")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("keys"))


def with_keys(uri: str, keys: Path | None, user: str = "") -> str:
    """`uri` with TLS by these keys: a directory of certificates or a file of pre-shared keys."""
    uri = uri.replace("nbd", "nbds", 1)
    if user:
        uri = uri.replace("://", f"://{user}@", 1)
    if keys is None:
        return uri
    what = "tls-psk-file" if keys.suffix == ".psk" else "tls-certificates"
    return f"{uri}{'&' if '?' in uri else '?'}{what}={keys}"


class Overt(Server):
    """A server that we test with, on TCP, which says itself by which keys it is asked whether it is
    there."""

    port: int
    ask_with: Path | None = None

    def plain_uri(self, export: str = "") -> str:
        return f"nbd://127.0.0.1:{self.port}/{export}"

    def is_ready(self) -> bool:
        uri = self.plain_uri()
        try:
            with connected(with_keys(uri, self.ask_with) if self.ask_with else uri):
                return True
        except nbd.Error:
            return False


class TlsNbdkit(Overt, NbdkitTarget):
    """nbdkit of an image, on TCP, with TLS options."""

    def __init__(
        self, folder: Path, image: Path, *options: str, ask_with: Path | None = None
    ) -> None:
        super().__init__(folder, "file", f"file={image}")
        self.port = free_port()
        self.tls, self.ask_with = options, ask_with

    def argv(self) -> list[str]:
        listen = ["-i", "127.0.0.1", "-p", str(self.port)]
        return ["nbdkit", "-f", *listen, *self.tls, self.plugin, *self.parameters]

    def is_ready(self) -> bool:
        """It may have keys that nobody accepts: then it is there when it listens."""
        try:
            with connected(self.plain_uri()):
                return True
        except nbd.Error as error:
            return "requires TLS" in str(error)


class TlsQemuNbd(Overt, QemuNbd):
    """qemu-nbd of an image, on TCP, with a tls-creds object."""

    def __init__(
        self, folder: Path, image: Path, credentials: str, ask_with: Path | None = None
    ) -> None:
        super().__init__(folder, image)
        self.port = free_port()
        self.credentials, self.ask_with = credentials, ask_with

    def argv(self) -> list[str]:
        listen = ["--bind=127.0.0.1", f"--port={self.port}", "--persistent", "--shared=16"]
        creds = [f"--object={self.credentials},id=t,endpoint=server", "--tls-creds=t"]
        return ["qemu-nbd", *listen, *creds, "--discard=unmap", "--format=raw", str(self.image)]

    is_ready = TlsNbdkit.is_ready


class TlsNbdmirror(Overt, Nbdmirror):
    """nbdmirror that serves with TLS."""

    def __init__(self, folder: Path, disk: Path, *options: str, ask_with: Path | None) -> None:
        super().__init__(folder, disk, tcp=True, options=options)
        self.ask_with = ask_with
        # What nbdkit says of clients that it turns away.
        self.allowed = [r"nbdkit: .*error: (gnutls|read|write|failed to|client|handshake|tls)"]

    def is_ready(self) -> bool:
        return super().is_ready() and self._control_answers()

    def _control_answers(self) -> bool:
        with Qmp(self.qmp_path):
            return True


@pytest.fixture
def disk(folder: Path) -> Path:
    return make_image(folder / "disk.img", SIZE)


@pytest.fixture
def mutual(start: Start, disk: Path, site: Site) -> TlsNbdmirror:
    """It serves with certificates, and wants its guests'."""
    options = ("--tls-certificates", str(site.server), "--tls-verify-peer")
    return start(TlsNbdmirror(disk.parent, disk, *options, ask_with=site.client))


@pytest.fixture
def by_psk(start: Start, disk: Path, site: Site) -> TlsNbdmirror:
    options = ("--tls-psk", str(site.psk))
    server = TlsNbdmirror(disk.parent, disk, *options, ask_with=site.psk)
    server.plain_uri = lambda export="": f"nbd://alice@127.0.0.1:{server.port}/{export}"  # type: ignore[method-assign]
    return start(server)


def refusal(uri: str) -> str:
    with pytest.raises(nbd.Error) as caught, connected(uri):
        pass
    return str(caught.value)


def is_open(uri: str) -> bool:
    """Whether a client gets in, and over TLS if it is to be."""
    with connected(uri) as handle:
        assert handle.get_tls_negotiated() == uri.startswith("nbds")
        handle.pread(512, 0)
    return True


# Guests


def test_certificates_and_every_client(mutual: TlsNbdmirror, site: Site, disk: Path) -> None:
    uri = with_keys(mutual.plain_uri(), site.client)
    assert is_open(uri)
    assert "TLS" in run("nbdinfo", uri).stdout
    assert_identical(disk, uri)
    copy = disk.parent / "copy"
    run("nbdcopy", uri, copy)
    assert_identical(disk, copy)
    creds = f"tls-creds-x509,id=t,endpoint=client,dir={site.client}"
    image = f"driver=nbd,host=127.0.0.1,port={mutual.port},tls-creds=t"
    again = disk.parent / "again"
    run("qemu-img", "convert", "--object", creds, "--image-opts", image, "-O", "raw", again)
    assert_identical(disk, again)
    with Guest(uri, disk, connections=3) as guest:
        guest.wait_for_requests(100)
    assert_identical(guest.model, disk)


def test_pre_shared_keys_and_every_client(by_psk: TlsNbdmirror, site: Site, disk: Path) -> None:
    uri = with_keys(by_psk.plain_uri(), site.psk)
    assert is_open(uri)
    assert "TLS" in run("nbdinfo", uri).stdout
    creds = f"tls-creds-psk,id=t,endpoint=client,dir={site.psk.parent},username=alice"
    image = f"driver=nbd,host=127.0.0.1,port={by_psk.port},tls-creds=t"
    copy = disk.parent / "copy"
    run("qemu-img", "convert", "--object", creds, "--image-opts", image, "-O", "raw", copy)
    assert_identical(disk, copy)


def test_tls_on_takes_plain_guests_too(start: Start, disk: Path, site: Site) -> None:
    options = ("--tls", "on", "--tls-certificates", str(site.server))
    server = start(TlsNbdmirror(disk.parent, disk, *options, ask_with=None))
    assert is_open(server.plain_uri())
    assert is_open(with_keys(server.plain_uri(), site.authority_alone))


def test_without_verify_peer_any_guest_gets_in(start: Start, disk: Path, site: Site) -> None:
    """As docs/tls.md warns: then certificates show guests who the server is, and no more."""
    options = ("--tls-certificates", str(site.server))
    ask = site.authority_alone
    server = start(TlsNbdmirror(disk.parent, disk, *options, ask_with=ask))
    assert is_open(with_keys(server.plain_uri(), site.authority_alone))


def test_guests_that_are_turned_away(mutual: TlsNbdmirror, site: Site, disk: Path) -> None:
    good = with_keys(mutual.plain_uri(), site.client)
    with Guest(good, disk) as guest:
        assert "requires TLS" in refusal(mutual.plain_uri())
        for wrong in (site.authority_alone, site.stranger, site.misled, site.expired_client):
            refusal(with_keys(mutual.plain_uri(), wrong))
        refusal(with_keys(mutual.plain_uri(), site.psk, "alice"))
        guest.wait_for_requests(20)
        assert is_open(good)
    assert_identical(guest.model, disk)


def test_guests_with_a_wrong_key_are_turned_away(by_psk: TlsNbdmirror, site: Site) -> None:
    plain = f"nbd://127.0.0.1:{by_psk.port}/"
    assert "requires TLS" in refusal(plain)
    refusal(with_keys(plain, site.wrong_psk, "alice"))
    refusal(with_keys(plain, site.unknown_psk, "bob"))
    refusal(with_keys(plain, site.client))
    assert is_open(with_keys(by_psk.plain_uri(), site.psk))


# Keys that cannot be served with


def serve(disk: Path, *options: str | Path) -> Finished:
    places = ("--socket", disk.parent / "s", "--qmp", disk.parent / "q")
    done = nbdmirror("serve", disk, *places, *options)
    assert not (disk.parent / "q").exists()
    return done


def one_line(done: Finished, *words: str, status: int = 1) -> None:
    said = done.stderr.strip()
    assert done.returncode == status, said
    assert len(said.splitlines()) == 1 and "Traceback" not in said, said
    for word in words:
        assert word in said, said


def test_keys_that_are_not_there(disk: Path, site: Site, folder: Path) -> None:
    one_line(serve(disk, "--tls-certificates", "/nope"), "--tls-certificates", "/nope", "no such")
    one_line(serve(disk, "--tls-certificates", disk), "is not a directory")
    one_line(serve(disk, "--tls-psk", "/nope.psk"), "--tls-psk", "/nope.psk", "No such file")
    one_line(serve(disk, "--tls-psk", folder), "Is a directory")
    one_line(serve(disk, "--tls-certificates", folder), "ca-cert.pem", "No such file")
    one_line(serve(disk, "--tls-certificates", site.client), "server-cert.pem", "No such file")
    one_line(serve(disk, "--tls", "on", "--tls-certificates", site.client), "server-cert.pem")


def test_keys_that_do_not_go_together(disk: Path, site: Site) -> None:
    for options in (
        ("--tls", "require"),
        ("--tls", "on"),
        ("--tls-verify-peer",),
        ("--tls-psk", site.psk, "--tls-verify-peer"),
        ("--tls-psk", site.psk, "--tls-certificates", site.server),
    ):
        one_line(serve(disk, *options), "--tls", status=2)


def test_keys_that_are_no_keys(disk: Path, site: Site, folder: Path) -> None:
    broken = site.authority.keys(folder / "broken", "server", *HERE)
    (broken / "server-key.pem").write_bytes((site.server / "server-key.pem").read_bytes())
    one_line(serve(disk, "--tls-certificates", broken), "server-cert.pem", "cannot be used")
    (broken / "server-key.pem").write_text("garbage")
    one_line(serve(disk, "--tls-certificates", broken), "server-key.pem", "cannot be used")
    garbage = folder / "garbage.psk"
    for text in ("", "alice\n", "alice:xyz\n", "# only this\n", "\n"):
        garbage.write_text(text)
        one_line(serve(disk, "--tls-psk", garbage), "garbage.psk")


@pytest.mark.parametrize("what", ["psk", "certificates"])
def test_keys_that_may_not_be_read(site: Site, folder: Path, what: str) -> None:
    """As root, who may read anything, by a child process that is nobody."""
    keys = psk(folder / "secret.psk", "alice")
    if what == "certificates":
        keys = site.authority.keys(folder / "secret", "server", *HERE)
        (keys / "server-key.pem").chmod(0)
        (keys / "ca-cert.pem").chmod(0o644)
        (keys / "server-cert.pem").chmod(0o644)
    else:
        keys.chmod(0)
    folder.chmod(0o755)

    def check() -> str:
        try:
            tls.check_server_keys(**{what: str(keys)})
        except ConfigError as error:
            return str(error)
        return "no error"

    said = as_nobody(check)
    assert said.endswith("Permission denied") and str(keys) in said


def as_nobody(call: Callable[[], str]) -> str:
    """What `call` returns in a child process without privileges."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            os.write(writer, call().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


def test_an_expired_certificate_is_warned_of(start: Start, disk: Path, site: Site) -> None:
    """No reason not to start: who does not verify gets in. Whoever does is told why not."""
    options = ("--tls-certificates", str(site.expired_server))
    server = TlsNbdmirror(disk.parent, disk, *options, ask_with=None)
    server.is_ready = server.qmp_path.exists  # type: ignore[method-assign]
    start(server)
    assert "server-cert.pem: it has expired" in server.stderr


@pytest.mark.parametrize("what", ["psk", "certificates"])
def test_keys_that_others_can_read_are_warned_of(
    start: Start, disk: Path, site: Site, folder: Path, what: str
) -> None:
    if what == "psk":
        keys = secret = psk(folder / "open.psk", "alice")
    else:
        keys = site.authority.keys(folder / "open", "server", *HERE)
        secret = keys / "server-key.pem"
    secret.chmod(0o644)
    server = TlsNbdmirror(disk.parent, disk, f"--tls-{what}", str(keys), ask_with=None)
    server.is_ready = server.qmp_path.exists  # type: ignore[method-assign]
    start(server)
    assert f"chmod 600 {secret}" in server.stderr


# Targets that do not get on with us

KINDS = ("nbdkit", "qemu-nbd")


def target_of(kind: str, folder: Path, *, keys: Path | None, verify: bool = True) -> Overt:
    """A target with these keys of a server; without TLS if there are none."""
    image = make_noise(folder / f"target{time.monotonic_ns()}.img", SIZE)
    if kind == "nbdkit":
        options: tuple[str, ...] = ()
        if keys is not None and keys.suffix == ".psk":
            options = ("--tls=require", f"--tls-psk={keys}")
        elif keys is not None:
            peer = ("--tls-verify-peer",) if verify else ()
            options = ("--tls=require", f"--tls-certificates={keys}", *peer)
        return TlsNbdkit(folder, image, *options)
    if keys is None:
        return TlsNbdkit(folder, image)
    if keys.suffix == ".psk":
        return TlsQemuNbd(folder, image, f"tls-creds-psk,dir={keys.parent}")
    peer = "on" if verify else "off"
    return TlsQemuNbd(folder, image, f"tls-creds-x509,dir={keys},verify-peer={peer}")


@pytest.fixture
def server(start: Start, disk: Path) -> Nbdmirror:
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    server.allowed = ["write error", "read error"]
    return server


def refused(server: Nbdmirror, uri: str) -> str:
    """What QMP says of that target, and the command line says the same. Nothing is left behind."""
    text = server.qmp.refusal(
        "drive-mirror", device="disk0", target=uri, mode="existing", sync="full"
    )
    assert "\n" not in text
    done = nbdmirror("mirror", uri, "--qmp", server.qmp_path)
    one_line(done, text.split(" (")[0])
    assert server.qmp.execute("query-jobs") == []
    assert len(server.qmp.execute("query-named-block-nodes")) == 1
    return text


WRONG: dict[str, tuple[str, str, str, list[str]]] = {
    # What is wrong -> the target's keys, ours, our user, words of the message.
    "wrong authority": ("server", "misled", "", ["certificate is not accepted", "not signed by"]),
    "expired": ("expired_server", "client", "", ["certificate is not accepted", "has expired"]),
    "wrong host": ("elsewhere", "client", "", ["is not accepted", "another host", "127.0.0.1"]),
    "no certificate": ("server", "authority_alone", "", ["does not accept us", "client-cert.pem"]),
    "a stranger's": ("server", "foreign", "", ["does not accept us", "is not signed by"]),
    "ours expired": ("server", "expired_client", "", ["does not accept us", "has expired"]),
    "wrong key": ("psk", "wrong_psk", "alice", ["does not accept user 'alice'", "another key"]),
    "unknown user": ("psk", "unknown_psk", "bob", ["does not accept user 'bob'", "know him"]),
    "keys for certificates": ("server", "psk", "alice", ["user 'alice'", "takes certificates"]),
    "certificates for keys": ("psk", "client", "", ["does not accept us", "pre-shared keys"]),
    "TLS for none": ("", "client", "", ["offers no TLS", "nbd://"]),
    "keys for none": ("", "psk", "alice", ["offers no TLS", "nbd://"]),
}


# qemu-nbd does not start with a certificate that has expired.
@pytest.mark.parametrize(
    ("kind", "case"),
    [(k, c) for k in KINDS for c in WRONG if (k, c) != ("qemu-nbd", "expired")],
)
def test_a_target_that_does_not_get_on_with_us(
    start: Start, folder: Path, site: Site, server: Nbdmirror, kind: str, case: str
) -> None:
    theirs, ours, user, words = WRONG[case]
    if ours == "foreign":  # their authority to verify them by, a certificate of another
        keys = folder / "foreign"
        site.authority.directory(keys)
        for name in ("client-cert.pem", "client-key.pem"):
            (keys / name).write_bytes((site.stranger / name).read_bytes())
    else:
        keys = getattr(site, ours)
    target = start(target_of(kind, folder, keys=getattr(site, theirs) if theirs else None))
    before = server.stderr
    said = refused(server, with_keys(target.plain_uri(), keys, user))
    for word in words:
        assert word in said, said
    assert "Traceback" not in server.stderr[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_client_of_a_target_that_demands_tls(
    start: Start, folder: Path, site: Site, server: Nbdmirror, kind: str
) -> None:
    target = start(target_of(kind, folder, keys=site.server))
    said = refused(server, target.plain_uri())
    assert "demands TLS" in said and "tls-creds" in said


def test_keys_of_ours_that_cannot_be_used(
    start: Start, folder: Path, site: Site, server: Nbdmirror
) -> None:
    target = start(target_of("nbdkit", folder, keys=site.server))
    plain = target.plain_uri()
    assert "no such directory" in refused(server, with_keys(plain, Path("/nope")))
    assert "ca-cert.pem: No such file" in refused(server, with_keys(plain, folder))
    assert "absolute path" in refused(server, with_keys(plain, Path("pki")))
    assert "No such file" in refused(server, with_keys(plain, Path("/nope.psk"), "alice"))
    assert "no key of user 'bob'" in refused(server, with_keys(plain, site.psk, "bob"))
    two = psk(psk(folder / "two.psk", "carol"), "dave")
    assert "2 users" in refused(server, with_keys(plain, two))
    half = site.authority.keys(folder / "half", "client")
    (half / "client-key.pem").unlink()
    assert "client-key.pem: No such file" in refused(server, with_keys(plain, half))


def test_servers_that_would_not_be_verified_are_refused(
    start: Start, folder: Path, site: Site, server: Nbdmirror
) -> None:
    """libnbd 1.14 connects to an expired, unknown server in both cases without a word."""
    if tls.client_keys("nbds://h", FIXED) is not None and _libnbd_verifies():
        pytest.skip(f"libnbd {nbd.NBD().get_version()} verifies these itself")
    expired = f"--tls-certificates={site.expired_server}"
    image = make_noise(folder / "target.img", SIZE)
    plain = start(TlsNbdkit(folder, image, "--tls=require", expired))
    said = refused(server, with_keys(plain.plain_uri(), None))
    assert "does not verify the server without keys" in said
    local = NbdkitTarget(folder, "file", f"file={image}", options=("--tls=require", expired))
    local.is_ready = local.socket.exists  # type: ignore[method-assign]
    start(local)
    said = refused(server, with_keys(local.uri(), site.client))
    assert "on a Unix socket" in said and "pre-shared keys" in said


def _libnbd_verifies() -> bool:
    try:
        tls.client_keys("nbds://h", nbd.NBD().get_version())
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("version", ["1.14.2", "1.18.4", "1.19.9", "1.20.2"])
def test_versions_that_verify(version: str, site: Site) -> None:
    unix = with_keys("nbd+unix:///?socket=/s", site.client)
    for uri in ("nbds://host/", unix):
        with pytest.raises(ConfigError, match="does not verify"):
            tls.client_keys(uri, version)
        for fixed in ("1.18.5", "1.20.3", "1.22.0", "2.0.0"):
            assert tls.client_keys(uri, fixed)
    assert tls.client_keys(with_keys("nbd://host/", site.client), version)
    assert tls.client_keys(with_keys("nbd+unix:///?socket=/s", site.psk), version)


# Mirrors


def test_the_keys_of_the_documentation(start: Start, folder: Path, disk: Path) -> None:
    """docs/tls.md makes them, and all of its site gets on with one another."""
    text = (ROOT / "docs" / "tls.md").read_text()
    match = re.search(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert match
    run("sh", "-euc", f"cd {folder}\n{match[1]}")
    options = ("--tls-certificates", str(folder / "server"), "--tls-verify-peer")
    server = start(TlsNbdmirror(folder, disk, *options, ask_with=folder / "client"))
    target = start(target_of("nbdkit", folder, keys=folder / "psk" / "keys.psk"))
    add_tls_target(server.qmp, target, folder / "psk")
    server.qmp.start_mirror("t")
    server.qmp.wait_ready()
    server.qmp.complete()
    assert_identical(disk, with_keys(server.plain_uri(), folder / "client"))
    assert "warning" not in server.stderr and "WARNING" not in server.stderr


def add_tls_target(qmp: Qmp, target: Overt, creds: Path, **options: Any) -> None:
    address = {"type": "inet", "host": "127.0.0.1", "port": str(target.port)}
    qmp.execute(
        "blockdev-add", driver="nbd", node_name="t", server=address, tls_creds=str(creds),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["certificates", "psk file", "psk directory"])
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_a_mirror_to_the_end(
    start: Start,
    folder: Path,
    site: Site,
    disk: Path,
    server: Nbdmirror,
    identical: Identical,
    kind: str,
    way: str,
    copy_mode: str,
) -> None:
    keys = site.server if way == "certificates" else site.psk
    target = start(target_of(kind, folder, keys=keys))
    creds = {"certificates": site.client, "psk file": site.psk, "psk directory": site.psk.parent}
    user = {} if way == "certificates" else {"x-nbdmirror-tls-username": "alice"}
    image = folder / Path(getattr(target, "image", "") or target.parameters[0][5:])  # type: ignore[attr-defined]
    with Guest(server.uri(), disk, connections=2) as guest:
        identical(guest, image)
        add_tls_target(server.qmp, target, creds[way], **user)
        server.qmp.start_mirror("t", copy_mode=copy_mode)
        server.qmp.wait_ready()
        guest.wait_for_requests(50)
        server.qmp.complete()
        guest.wait_for_requests(50)  # now on the target, over TLS


def test_drive_mirror_and_the_command_line(
    start: Start, folder: Path, site: Site, disk: Path, server: Nbdmirror, identical: Identical
) -> None:
    target = start(target_of("nbdkit", folder, keys=site.server))
    uri = with_keys(target.plain_uri(), site.client)
    done = nbdmirror("mirror", uri, "--wait", "completed", "--qmp", server.qmp_path)
    assert done.returncode == 0, done.stderr
    identical(disk, uri)


def test_the_user_is_taken_from_the_file(
    start: Start, folder: Path, site: Site, server: Nbdmirror, disk: Path, identical: Identical
) -> None:
    """Where it has one user only: a daemon has no login name that could be meant."""
    target = start(target_of("nbdkit", folder, keys=site.psk))
    add_tls_target(server.qmp, target, site.psk)
    server.qmp.start_mirror("t")
    server.qmp.wait_ready()
    server.qmp.complete()
    identical(disk, with_keys(target.plain_uri(), site.psk, "alice"))


def test_keys_that_others_can_read_are_warned_of_in_the_log(
    start: Start, folder: Path, site: Site, server: Nbdmirror
) -> None:
    target = start(target_of("nbdkit", folder, keys=site.psk))
    loose = folder / "loose.psk"
    loose.write_bytes(site.psk.read_bytes())
    loose.chmod(0o666)
    add_tls_target(server.qmp, target, loose)
    assert server.stderr.count(f"chmod 600 {loose}") == 1
    loose.chmod(stat.S_IRUSR)


def test_a_user_without_keys_is_refused(server: Nbdmirror) -> None:
    address = {"type": "inet", "host": "127.0.0.1", "port": "1"}
    options = {"x-nbdmirror-tls-username": "alice"}
    text = server.qmp.refusal(
        "blockdev-add", driver="nbd", node_name="t", server=address, **options
    )
    assert "needs 'tls-creds'" in text
    text = server.qmp.refusal(
        "blockdev-add", driver="nbd", node_name="t", server=address, tls_creds="/nope"
    )
    assert "No TLS credentials with id '/nope'" in text


@pytest.mark.parametrize("way", ["certificates", "psk"])
def test_a_target_that_was_killed_and_comes_back(
    start: Start,
    folder: Path,
    site: Site,
    disk: Path,
    server: Nbdmirror,
    identical: Identical,
    way: str,
) -> None:
    theirs, ours = (site.server, site.client) if way == "certificates" else (site.psk, site.psk)
    target = start(target_of("nbdkit", folder, keys=theirs))
    with Guest(server.uri(), disk) as guest:
        add_tls_target(server.qmp, target, ours, reconnect_delay=20)
        server.qmp.start_mirror("t")
        server.qmp.wait_ready()
        guest.wait_for_requests(20)
        target.kill()
        guest.wait_for_requests(20)
        target.start()
        guest.wait_for_requests(20)
        server.qmp.complete()
        assert not [e for e in server.qmp.events if e["event"] == "BLOCK_JOB_ERROR"]
        identical(guest, with_keys(target.plain_uri(), ours, "alice" if way == "psk" else ""))


@pytest.mark.parametrize("policy", ["report", "stop"])
def test_a_certificate_that_expires_meanwhile(
    start: Start,
    folder: Path,
    site: Site,
    disk: Path,
    server: Nbdmirror,
    identical: Identical,
    policy: str,
) -> None:
    """It was good when the mirror began. The connection is cut after it has expired: connecting
    again fails, the log says why, and the error policy follows."""
    end = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=LIFE_S)
    gone = end + dt.timedelta(seconds=1)  # certificates count whole seconds
    keys = site.authority.keys(folder / "short", "server", *HERE, *until(end))
    image = make_noise(folder / "target.img", SIZE)
    options = ("--tls=require", f"--tls-certificates={keys}")
    target = TlsNbdkit(folder, image, *options)
    behind = start(target)
    with Proxy(("127.0.0.1", behind.port)) as proxy, Guest(server.uri(), disk) as guest:
        uri = with_keys(proxy.uri, site.authority_alone)
        behind.port = proxy.port  # the target as it is seen
        add_tls_target(server.qmp, behind, site.authority_alone, reconnect_delay=1)
        server.qmp.start_mirror("t", on_target_error=policy, auto_dismiss=False)
        server.qmp.wait_ready()
        wait_until(lambda: dt.datetime.now(dt.UTC) > gone, "the certificate expires")
        proxy.reset()
        if policy == "stop":
            server.qmp.wait_status("standby")
        else:
            assert server.qmp.wait_for_event("BLOCK_JOB_COMPLETED")["error"]
        assert "the server's certificate is not accepted: it has expired" in server.stderr
        assert "expired" in server.qmp.refusal(
            "drive-mirror", device="disk0", target=uri, mode="existing", sync="full"
        )
        guest.wait_for_requests(20)
        if policy == "stop":
            server.qmp.execute("job-cancel", id="j")
            server.qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    identical(guest, server.uri())


# Sources


@pytest.mark.parametrize("way", ["certificates", "psk"])
def test_a_source_over_tls(start: Start, folder: Path, site: Site, disk: Path, way: str) -> None:
    theirs, ours = (site.server, site.client) if way == "certificates" else (site.psk, site.psk)
    source = start(target_of("nbdkit", folder, keys=theirs))
    user = "alice" if way == "psk" else ""
    uri = with_keys(source.plain_uri(), ours, user)
    server = start(Nbdmirror(folder, uri))
    with Guest(server.uri(), uri, connections=3) as guest:
        guest.wait_for_requests(100)
    assert_identical(guest.model, uri)


def test_a_source_whose_keys_are_wrong_is_not_served(
    start: Start, folder: Path, site: Site
) -> None:
    source = start(target_of("nbdkit", folder, keys=site.server))
    uri = with_keys(source.plain_uri(), site.misled)
    done = nbdmirror("serve", uri, "--socket", folder / "s", "--qmp", folder / "q")
    one_line(done, "not signed by")
