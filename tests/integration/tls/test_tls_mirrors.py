"""Mirrors over TLS, from the start to the end; and certificates that expire meanwhile."""

from __future__ import annotations

import datetime as dt
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from integration.tls.tlsparts import (
    KINDS,
    SIZE,
    Overt,
    Site,
    TlsNbdkit,
    TlsNbdmirror,
    target_of,
    with_keys,
)
from support.fixtures import Identical, Start
from support.guests import Guest
from support.images import assert_identical, make_noise
from support.keys import HERE, until
from support.processes import ROOT, nbdmirror, run
from support.proxy import Proxy
from support.qmpclient import Qmp
from support.servers import Nbdmirror
from support.waiting import wait_until

LIFE_S = 14
"""Of a certificate that is to expire during a test: long enough for the mirror to get ready."""


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
