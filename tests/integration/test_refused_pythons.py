"""A Python that cannot run nbdmirror is refused with one line, whichever way it comes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.processes import ROOT, Finished, nbdmirror_environment, patched, run
from support.servers import PLUGIN
from support.waiting import WAIT_S_MAX

OLD = "import sys\nsys.version_info = (3, 10, 2, 'final', 0)\n"
FREE_THREADED = "import sys\nsys._is_gil_enabled = lambda: False\n"
PYTHONS = pytest.mark.parametrize(
    ("patch", "words"), [(OLD, "3.11 or"), (FREE_THREADED, "GIL")], ids=["old", "free-threaded"]
)
"""The interpreter that is here, pretending to be another one."""


def under(folder: Path, patch: str, *command: str | Path) -> Finished:
    return subprocess.run(
        [str(word) for word in command],
        env=patched(nbdmirror_environment(), folder, patch),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S_MAX,
        check=False,
    )


def assert_refused(done: Finished, *words: str) -> None:
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert done.stdout == ""
    for word in words:
        assert word in line


@PYTHONS
@pytest.mark.parametrize("command", [["serve", "disk.img"], ["status"], ["--help"]])
def test_the_command_line(tmp_path: Path, patch: str, words: str, command: list[str]) -> None:
    done = under(tmp_path, patch, sys.executable, "-m", "nbdmirror", *command)
    assert_refused(done, "nbdmirror:", words)


@PYTHONS
def test_the_plugin_alone(folder: Path, patch: str, words: str) -> None:
    (folder / "disk.img").write_bytes(bytes(4096))
    command = ["nbdkit", "-f", "-U", f"{folder}/s", "python"]
    disk = f"file={folder / 'disk.img'}"
    assert_refused(under(folder, patch, *command, PLUGIN, disk), "nbdmirror:", words)
    assert not (folder / "s").exists()


@PYTHONS
@pytest.mark.parametrize("command", ["demo", "test", "setup"])
def test_the_checkout(tmp_path: Path, patch: str, words: str, command: str) -> None:
    assert_refused(under(tmp_path, patch, ROOT / "run", command), "run: /usr/bin/python3", words)


def test_what_is_compiled_for_another_python(folder: Path) -> None:
    """A virtual environment's folder that nbdkit's Python, run by hand, was led to."""
    packages = folder / "site-packages"
    shutil.copytree(Path(sysconfig.get_path("platlib")) / "bitarray", packages / "bitarray")
    for library in (packages / "bitarray").glob("*.so"):
        library.rename(library.with_name(library.name.replace("cpython-3", "cpython-2")))
    command: list[str | Path] = [
        "env",
        f"PYTHONPATH={packages}",
        "nbdkit",
        "-f",
        "-U",
        folder / "s",
        "python",
    ]
    done = run(*command, PLUGIN, f"file={folder / 'disk.img'}", check=False)
    assert_refused(done, "nbdmirror: nbdkit's Python", "bitarray")


@pytest.mark.parametrize(
    ("version", "words"), [("3.9.2", "nbdkit's Python is 3.9.2"), ("", "does not work")]
)
def test_a_checkout_with_an_nbdkit_of_another_python(
    tmp_path: Path, version: str, words: str
) -> None:
    """Before anything is made."""
    for name in ("run", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "bin" / "nbdkit"
    fake.parent.mkdir()
    fake.write_text(
        f"""#!/bin/sh
        [ "$2" != --dump-plugin ] || {{ echo python_version={version}; exit 0; }}
        exec {shutil.which("nbdkit")} "$@"
        """
    )
    fake.chmod(0o755)
    path = f"PATH={fake.parent}:{os.environ['PATH']}"
    assert_refused(run("env", path, tmp_path / "run", "demo", check=False), "run: ", words)
    assert not (tmp_path / ".venv").exists()
