"""The invariants of a mirror and of points, fifty times as long as in `./run test`, and with new
seeds each time: a failure prints the blob that replays it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from model.cutmachine import CutMachine
from model.machine import MirrorMachine
from model.pointmachine import PointMachine
from model.search import STEPS
from model.test_mirror_invariant import EXAMPLES

ROUNDS = 25

pytestmark = pytest.mark.stress


@pytest.mark.parametrize("machine", [MirrorMachine, PointMachine, CutMachine])
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_the_invariant_holds_for_long(
    round_: int, machine: type[MirrorMachine | PointMachine | CutMachine]
) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=2 * STEPS,
            print_blob=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
