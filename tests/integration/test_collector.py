"""Python's collector of cycles passes over what a process has had since its start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.fixtures import Start
from support.processes import nbdmirror_environment, patched, run
from support.servers import Nbdmirror

MANY = 10_000
"""Objects: fewer than the modules of either process have."""


def noting(place: Path) -> str:
    """Code that writes down at the interpreter's end how many objects the collector passes over. 0:
    the collector does nothing."""
    return (
        "import atexit, gc, pathlib\n"
        f"note = pathlib.Path({str(place)!r}).write_text\n"
        "atexit.register(lambda: note(str(gc.isenabled() * gc.get_freeze_count())))\n"
    )


@pytest.mark.parametrize("is_bare", [True, False])
def test_a_server_ends_without_a_look_at_all_objects(
    start: Start, folder: Path, disk: Path, is_bare: bool
) -> None:
    place = folder / "count"

    class Noting(Nbdmirror):
        def environment(self) -> dict[str, str]:
            return patched(super().environment(), folder, noting(place))

    start(Noting(folder, disk, bare=is_bare)).stop()
    assert int(place.read_text()) > MANY


def test_a_command_ends_without_a_look_at_all_objects(folder: Path) -> None:
    place = folder / "count"
    environment = patched(nbdmirror_environment(), folder, noting(place))
    path = f"PYTHONPATH={environment['PYTHONPATH']}"
    command = (sys.executable, "-m", "nbdmirror", "status", "--qmp", folder / "none")
    run("env", path, *command, check=False)
    assert int(place.read_text()) > MANY
