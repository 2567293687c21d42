"""A site's keys, a disk, and servers of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.tls.tlsparts import SIZE, Site, TlsNbdmirror
from support.fixtures import Start
from support.images import make_image
from support.servers import Nbdmirror


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("keys"))


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


@pytest.fixture
def server(start: Start, disk: Path) -> Nbdmirror:
    server = start(Nbdmirror(disk.parent, disk, bare=True))
    server.allowed = ["write error", "read error"]
    return server
