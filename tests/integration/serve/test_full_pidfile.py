"""A pid file that nbdkit cannot write is an error: a script would kill nothing with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.images import MiB, make_image
from support.mounts import mounted
from support.processes import run
from support.servers import Nbdmirror


@pytest.mark.parametrize("options", [(), ("--daemonize",)])
def test_on_a_full_file_system(folder: Path, options: tuple[str, ...]) -> None:
    disk = make_image(folder / "disk.img", MiB)
    with mounted("tmpfs", "size=64k") as full:
        (full / "filler").write_bytes(b"x" * (64 << 10))
        pidfile = full / "pid"
        server = Nbdmirror(folder, disk, options=("--pidfile", str(pidfile), *options))
        done = run(*server.argv(), check=False)
        assert done.returncode == 1
        assert f"pidfile: {pidfile}: is empty: is its file system full?" in done.stderr
        assert not pidfile.exists()
    assert not server.socket.exists()
