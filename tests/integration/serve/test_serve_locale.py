"""A server that a script with LC_ALL=C has started, as many do so that tools speak English: names
of disks, sockets, directories and targets are what they are in any other locale."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.images import MiB, assert_identical, make_image, make_noise
from support.processes import has_ended, nbdmirror
from support.servers import QemuNbd
from support.waiting import wait_until


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_names_beyond_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locale: str) -> None:
    folder = tmp_path / "größe"
    folder.mkdir()
    disk, target = make_noise(folder / "dísk.img", MiB), make_image(folder / "täget.img", MiB)
    pidfile, state = folder / "pïd", folder / "zustände"
    monkeypatch.setenv("LC_ALL", locale)
    with QemuNbd(tmp_path, target) as server:
        (folder / "zïel").symlink_to(server.socket)
        uri = f"nbd+unix:///?socket={folder}/zïel"
        places: list[str | Path] = [
            "--socket",
            folder / "ß",
            "--qmp",
            folder / "qß",
            "--pidfile",
            pidfile,
        ]
        started = nbdmirror("serve", disk, *places, "--state-dir", state, "--daemonize")
        assert started.returncode == 0, started.stderr
        pid = int(pidfile.read_text())
        try:
            done = nbdmirror("mirror", uri, "--wait", "completed", "--qmp", folder / "qß")
            assert done.returncode == 0, done.stderr
            shown = nbdmirror("status", "--qmp", folder / "qß")
            assert "größe" in shown.stdout
        finally:
            os.kill(pid, 15)
        wait_until(lambda: has_ended(pid), "the server ends")
        again = nbdmirror("serve", disk, *places, "--state-dir", state, "--daemonize")
        assert "is not the disk any more" in again.stderr, "the pivot is on record"
        assert_identical(disk, target)
