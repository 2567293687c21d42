"""The matrix of kills: a round of half of the cells and half of the steps of a pivot, as the seed
has it. `./run soak` has all of them, for as long as one likes."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import nbd
import pytest
from faults.roundplan import GUESTS, PHASES, SIZE, STEPS_MAX, WHATS, Cell
from faults.rounds import Round
from faults.roundscene import Mirror
from support.fixtures import Identical, Start, temporary_folder
from support.guests import Guest
from support.images import MiB, make_image, make_noise
from support.losing import Lossy, add_target
from support.seeds import SEED, print_seed
from support.waiting import wait_until


@pytest.mark.guarantee("Killed in any phase")
@pytest.mark.parametrize(("what", "phase"), list(product(WHATS, PHASES)))
def test_a_round(folder: Path, what: str, phase: str) -> None:
    print_seed()
    cell = Cell(what, phase, GUESTS[SEED % 2])
    outcome = Round(folder, cell, SEED).run()
    sys.stdout.write(f"{outcome}\n")


@pytest.mark.guarantee("Killed in any phase")
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
from nbdmirror.disk.tracker import Tracker
Tracker.target_came_back = lambda self: self._with_claims(self.dirty)
""",
    ),
    "what was dirty is forgotten": (
        Cell("server", "READY", "busy"),
        """
from nbdmirror.state.recovery import RecoveredState
RecoveredState.restore = RecoveredState.restore_mirror = lambda *arguments: None
""",
    ),
    "everything is copied again": (
        Cell("server", "READY", "idle"),
        """
from nbdmirror.state.recovery import RecoveredState
RecoveredState.restore_mirror = lambda self, tracker, key: tracker.mark_all()
""",
    ),
    "a pivot is not written down": (
        Cell("server", "pivoted", "idle"),
        """
from nbdmirror.state.store import DiskStore
DiskStore.prepare_end = lambda self, pivot_to, done: done(None)
DiskStore.commit_end = lambda self, done: done(None)
""",
    ),
    "flushes do not reach the target": (
        Cell("target", "pivoted", "busy"),
        ("from nbdmirror.nbdclient.device import NbdDevice\nNbdDevice.flush = lambda self: None\n"),
    ),
    "a loss is not told": (
        Cell("target", "pivoted", "busy"),
        """
from nbdmirror.nbdclient.device import NbdDevice
NbdDevice._lose_writes = lambda self: None
""",
    ),
}
"""Name -> the cell that is to catch it, and what the server's interpreter is told first."""

LOSSY = {"target": "lossy", "is_write_blocking": False}
CHOSEN: dict[str, dict[str, object]] = {
    "what was not flushed is forgotten": {**LOSSY, "guest_goes_on": False},
    "flushes do not reach the target": LOSSY,
    "a loss is not told": LOSSY,
}
"""Name -> what a round must have for this mutant to be seen in more than half of the rounds."""

MUTANT_ROUNDS_MAX = 24


@pytest.mark.timeout(240)
@pytest.mark.guarantee("Killed in any phase")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_server_is_caught(name: str) -> None:
    cell, patches = MUTANTS[name]
    for number in range(MUTANT_ROUNDS_MAX):
        with temporary_folder() as folder:
            try:
                chosen = CHOSEN.get(name, {})
                Round(folder, cell, SEED + number, patches=patches, chosen=chosen).run()
            except (AssertionError, nbd.Error) as error:
                if "did not start" in str(error):
                    pytest.fail(f"the mutant itself is broken: {error}")
                return
    pytest.fail(f"{MUTANT_ROUNDS_MAX} rounds of {cell} have not noticed")


# Found by the rounds


SLOW_STATE = """
import os
fsync, flag = os.fsync, {flag!r}

def slow(fd):
    # The state directory is slow for as long as there is the file.
    wait_while(lambda: os.path.exists(flag))
    return fsync(fd)

os.fsync = slow
"""


@pytest.mark.parametrize("reconnect_delay_s", [20, 0])
def test_a_target_that_is_lost_while_an_end_is_being_written_down(
    start: Start, folder: Path, identical: Identical, reconnect_delay_s: int
) -> None:
    """Copies go on meanwhile, and all of them fail at once: the control socket answers, and the
    target is waited for, or the policy is asked. The speed limit sees to it that there is something
    left to copy."""
    disk = make_image(folder / "disk.img", SIZE)
    target = start(Lossy(folder, make_noise(folder / "target.img", SIZE)))
    flag = folder / "slow"
    server = Mirror(folder, disk)
    server.patches = SLOW_STATE.format(flag=str(flag))
    start(server)
    add_target(server.qmp, target.uri(), reconnect_delay_s)
    qmp = server.qmp
    qmp.start_mirror("tgt", device="vda", on_target_error="stop")
    qmp.wait_ready()
    qmp.execute("block-job-set-speed", device="j", speed=2 * MiB)
    with Guest(server.uri("vda"), disk, length_max=4096) as guest:
        guest.wait_for_requests(200)
        flag.touch()
        qmp.execute("block-job-complete", device="j")
        target.order("kill write 2")
        target.wait_killed()
        guest.wait_for_requests(50)
        lost_at = target.mark()
        if reconnect_delay_s:
            assert qmp.job()["status"] == "ready"
        else:
            qmp.wait_status("standby")
        target.come_back()
        if not reconnect_delay_s:
            qmp.execute("block-job-resume", device="j")
        wait_until(lambda: target.changed(lost_at), "copies go on before the end is written down")
        flag.unlink()
        qmp.execute("block-job-set-speed", device="j", speed=0)
        qmp.wait_completed()
        identical(guest, target.uri())
