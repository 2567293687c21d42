"""Targets and sources whose TLS does not get on with ours: each fails with the line that the user
reads."""

from __future__ import annotations

from pathlib import Path

import nbd
import pytest
from integration.tls.test_tls_guests import one_line
from integration.tls.tlsparts import KINDS, SIZE, Site, TlsNbdkit, target_of, with_keys
from support.fixtures import Start
from support.guests import Guest
from support.images import assert_identical, make_noise
from support.keys import psk
from support.processes import nbdmirror
from support.servers import NbdkitTarget, Nbdmirror

from nbdmirror.errors import ConfigError
from nbdmirror.nbdclient import tls

FIXED = "1.20.3"
"""A libnbd that verifies always."""


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
    "no certificate": (
        "server",
        "authority_alone",
        "",
        ["does not accept this", "client-cert.pem"],
    ),
    "a stranger's": ("server", "foreign", "", ["does not accept this", "is not signed by"]),
    "ours expired": ("server", "expired_client", "", ["does not accept this", "has expired"]),
    "wrong key": ("psk", "wrong_psk", "alice", ["does not accept user 'alice'", "another key"]),
    "unknown user": ("psk", "unknown_psk", "bob", ["does not accept user 'bob'", "know the user"]),
    "keys for certificates": ("server", "psk", "alice", ["user 'alice'", "requires certificates"]),
    "certificates for keys": ("psk", "client", "", ["does not accept this", "pre-shared keys"]),
    "TLS for none": ("", "client", "", ["offers no TLS", "nbd://"]),
    "keys for none": ("", "psk", "alice", ["offers no TLS", "nbd://"]),
}


# qemu-nbd does not start with a certificate that has expired.
@pytest.mark.guarantee("A TLS peer is verified, or the connection refused")
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
    assert "No such file" in refused(server, with_keys(plain, Path("/nope.psk"), "alice"))
    assert "no key of user 'bob'" in refused(server, with_keys(plain, site.psk, "bob"))
    two = psk(psk(folder / "two.psk", "carol"), "dave")
    assert "2 users" in refused(server, with_keys(plain, two))
    half = site.authority.keys(folder / "half", "client")
    (half / "client-key.pem").unlink()
    assert "client-key.pem: No such file" in refused(server, with_keys(plain, half))


@pytest.mark.guarantee("A TLS peer is verified, or the connection refused")
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
