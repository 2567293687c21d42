"""Runs of the state machines: that the rules hold, and the search for steps at which a broken rule
is caught."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

STEPS = 40
MUTANT_SEARCHES_MAX = 20
QUICK = 10


def in_parts(examples: int) -> pytest.MarkDecorator:
    """For a test that takes `examples`: a search with a tenth of them, which takes a second, for
    `./run test --unit`, and one with the others."""
    quick = examples // QUICK
    slow = pytest.param(examples - quick, id="others", marks=pytest.mark.slow)
    return pytest.mark.parametrize("examples", [pytest.param(quick, id="some"), slow])


def hold(machine: type, examples: int) -> None:
    """Run a machine whose rules hold. Hypothesis prints the steps of a failure."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def search(kind: type, mutant: type, examples_max: int) -> None:
    """Run the machine `kind` with the world `mutant`. The same steps each time, so that a search
    does not fail by bad luck. Several short searches find more than a long one, in which Hypothesis
    keeps to what it has found interesting."""
    machine: Any = type(f"{mutant.__name__}Machine", (kind,), {"world_class": mutant})
    for number in range(MUTANT_SEARCHES_MAX):
        run_state_machine_as_test(
            seed(number)(machine),
            settings=settings(
                max_examples=examples_max,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
