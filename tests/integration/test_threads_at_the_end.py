"""A server's end while its threads start others: CPython 3.11 would crash when it ends itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fixtures import Start
from support.images import MiB, make_noise
from support.servers import Nbdmirror

BREEDING = """
import threading
import nbdmirror.threads

use = nbdmirror.threads.start_threads_on

def breed():
    while True:
        nbdmirror.threads.start_thread(lambda: None, "child")

def use_and_breed(loop):
    use(loop)
    if loop is not None:
        for _ in range(3):
            threading.Thread(target=breed, daemon=True).start()

nbdmirror.threads.start_threads_on = use_and_breed
"""


class Breeding(Nbdmirror):
    """Its threads start others all the time."""

    patches = BREEDING

    def environment(self) -> dict[str, str]:
        """What is freed is overwritten: otherwise its use is mostly not noticed."""
        return super().environment() | {"MALLOC_PERTURB_": "165"}


@pytest.mark.parametrize("time", range(20))
def test_a_server_ends_in_order_while_threads_start(start: Start, folder: Path, time: int) -> None:
    server = start(Breeding(folder, make_noise(folder / "disk.img", MiB), bare=True))
    server.stop()  # checks the exit status, and the log
