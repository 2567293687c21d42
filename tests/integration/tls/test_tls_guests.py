"""TLS towards guests: certificates, mutual too, and pre-shared keys; who is turned away, and keys
that cannot be served with, each with the line that the user reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from integration.tls.tlsparts import Site, TlsNbdmirror, Unasked, refusal, with_keys
from support.clients import connected
from support.fixtures import Start
from support.guests import Guest
from support.images import assert_identical
from support.keys import HERE, psk
from support.processes import Finished, nbdmirror, run

from nbdmirror.errors import ConfigError
from nbdmirror.nbdclient import tls


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
    server = start(Unasked(disk.parent, disk, *options, ask_with=None))
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
    server = start(Unasked(disk.parent, disk, f"--tls-{what}", str(keys), ask_with=None))
    assert f"chmod 600 {secret}" in server.stderr
