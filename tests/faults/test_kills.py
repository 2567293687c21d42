"""The matrix of kills: a round of half of the cells and half of the steps of a pivot, as the seed
has it. `./run soak` has all of them, for as long as one likes."""

from __future__ import annotations

import os
import random
import sys
from itertools import product
from pathlib import Path

import nbd
import pytest
from conftest import temporary_folder
from rounds import GUESTS, PHASES, STEPS_MAX, WHATS, Cell, Round

SEED = int(os.environ.get("NBDMIRROR_KILL_SEED") or random.SystemRandom().randrange(1_000_000))
"""A new one each time, unless the environment has one."""


@pytest.mark.parametrize(("what", "phase"), list(product(WHATS, PHASES)))
def test_a_round(folder: Path, what: str, phase: str) -> None:
    sys.stdout.write(f"NBDMIRROR_KILL_SEED={SEED}\n")  # pytest shows it with a failure
    cell = Cell(what, phase, GUESTS[SEED % 2])
    outcome = Round(folder, cell, SEED).run()
    sys.stdout.write(f"{outcome}\n")


@pytest.mark.parametrize("number", range(STEPS_MAX // 2))
def test_steps_of_a_pivot(folder: Path, number: int) -> None:
    """The server is killed before every other of the steps in its state directory: it is served
    from the old side or from the new one, never from both, and nothing is missing there."""
    step = 2 * number + SEED % 2
    chosen = {"step": step, "looks_at_target_first": bool(SEED // 2 % 2)}
    Round(folder, Cell("server", "completing", "busy"), SEED, chosen=chosen).run()


# That the rounds would notice


MUTANTS = {
    "what was not flushed is forgotten": (
        Cell("target", "READY", "busy"),
        """
from nbdmirror.ledger import Tracker
Tracker.target_came_back = lambda self: self._with_claims(self.dirty)
""",
    ),
    "what was dirty is forgotten": (
        Cell("server", "READY", "busy"),
        "from nbdmirror.diskstate import Found\nFound.restore = lambda *arguments: None\n",
    ),
    "everything is copied again": (
        Cell("server", "READY", "idle"),
        """
from nbdmirror.diskstate import Found
Found.restore = lambda self, bitmap, key: bitmap.mark_all()
""",
    ),
    "a pivot is not written down": (
        Cell("server", "pivoted", "idle"),
        """
from nbdmirror.store import DiskStore
DiskStore.prepare_end = lambda self, pivot_to, done: done(None)
DiskStore.commit_end = lambda self, done: done(None)
""",
    ),
    "flushes do not reach the target": (
        Cell("target", "pivoted", "busy"),
        "from nbdmirror.remote import RemoteDevice\nRemoteDevice.flush = lambda self: None\n",
    ),
    "a loss is not told": (
        Cell("target", "pivoted", "busy"),
        """
from nbdmirror.remote import RemoteDevice
RemoteDevice._lose_writes = lambda self: None
""",
    ),
}
"""Name -> the cell that is to catch it, and what the server's interpreter is told first."""

MUTANT_ROUNDS_MAX = 12


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_server_is_caught(name: str) -> None:
    cell, patches = MUTANTS[name]
    for number in range(MUTANT_ROUNDS_MAX):
        with temporary_folder() as folder:
            try:
                Round(folder, cell, SEED + number, patches=patches).run()
            except (AssertionError, nbd.Error):
                return
    pytest.fail(f"{MUTANT_ROUNDS_MAX} rounds of {cell} have not noticed")
