"""The demo runs, leaves nothing behind, and would notice if it went wrong."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support.images import MiB
from support.processes import ROOT

from nbdmirror.web.live import EVENTS

DEMO = ROOT / "docs" / "demo.py"


@pytest.fixture
def room() -> Iterator[Path]:
    """On a disk: in memory there may not be room enough."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def look(address: str, seen: list[str]) -> None:
    """Until the page is gone: keep the lines of what it shows, as it changes."""
    with (
        contextlib.suppress(OSError, http.client.HTTPException),
        urllib.request.urlopen(urllib.parse.urljoin(address, EVENTS), timeout=60) as stream,
    ):
        seen.extend(line.decode() for line in stream)


@pytest.mark.timeout(120)
def test_the_demo_in_a_browser(room: Path) -> None:
    """Its page shows the mirror from its start to after its pivot."""
    seen: list[str] = []
    with subprocess.Popen(
        [sys.executable, DEMO, "--web"],
        cwd="/",
        env={**os.environ, "TMPDIR": str(room)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"page that shows it, in a browser: (http://\S+)", line):
                looking = threading.Thread(target=look, args=(found[1], seen))
                looking.start()
    looking.join(30)
    assert process.returncode == 0, "".join(lines)
    for text in ("source.img", "Job disk0", "Map of the disk", "Last job disk0: completed"):
        assert any(text in line for line in seen), text
    assert not list(room.iterdir())


def run_demo(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DEMO],
        cwd="/",
        env={**os.environ, "TMPDIR": str(folder), **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.guarantee("Completed means identical")
@pytest.mark.guarantee("No request is lost, fails or is answered twice")
@pytest.mark.timeout(120)
def test_the_demo(room: Path) -> None:
    done = run_demo(room)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("is ready", "times over", "the pivot held the guest for", "all verified"):
        assert text in done.stdout
    assert "./run demo --web" in done.stdout.splitlines()[-1]
    assert not list(room.iterdir())


def test_what_is_missing_is_named(room: Path) -> None:
    done = run_demo(room, PATH=str(room))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("== FAILED: ")
    assert "Traceback" not in done.stderr
    assert not list(room.iterdir())


# What it looks at in the end


@pytest.fixture
def demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """In a folder with two images as they are after a good run, smaller."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FILE_SYSTEM_BYTES", 32 * MiB)
    monkeypatch.setattr(module, "DISK_BYTES", 33 * MiB)
    monkeypatch.setattr(module, "FILES_BYTES", 4 * MiB)
    monkeypatch.chdir(folder)
    module.make_files(Path("files"))
    module.tool("mke2fs", "-q", "-F", "-t", "ext4", "-d", "files", "source.img", "32M")
    os.truncate("source.img", 33 * MiB)
    Path("target.img").write_bytes(Path("source.img").read_bytes())
    overwrite("target.img", 32 * MiB + 5000)  # by the client, after the pivot
    return module


def overwrite(path: str, offset: int, data: bytes = b"different") -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_good_run_is_found_good(demo: ModuleType) -> None:
    demo.check_images(demo.digest(Path("source.img")))


def change_the_file_system(demo: ModuleType) -> None:
    overwrite("target.img", 31 * MiB)


def change_a_file(demo: ModuleType) -> None:
    Path("files/sparse").write_bytes(b"")


def lose_the_end(demo: ModuleType) -> None:
    os.truncate("target.img", 32 * MiB)


def break_the_file_system(demo: ModuleType) -> None:
    for image in ("source.img", "target.img"):
        overwrite(image, 1024, bytes(65536))


def write_to_neither(demo: ModuleType) -> None:
    Path("target.img").write_bytes(Path("source.img").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (change_the_file_system, "file systems of source and target differ"),
        (change_a_file, "files on the target are not those"),
        (lose_the_end, "the target has"),
        (break_the_file_system, "e2fsck ended with status"),
        (write_to_neither, "after the pivot is not on the target"),
    ],
)
def test_what_is_wrong_is_noticed(
    demo: ModuleType, spoil: Callable[[ModuleType], None], text: str
) -> None:
    spoil(demo)
    with pytest.raises(demo.DemoError, match=text):
        demo.check_images(demo.digest(Path("source.img")))


def test_a_late_write_to_the_source_is_noticed(demo: ModuleType) -> None:
    before = demo.digest(Path("source.img"))
    overwrite("source.img", 32 * MiB)
    with pytest.raises(demo.DemoError, match="the source was written to after the pivot"):
        demo.check_images(before)
