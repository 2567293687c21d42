"""Runs of the state machines: that the rules hold, and the search for steps at which a broken rule
is caught."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

STEPS = 40
MUTANT_SEARCHES_MAX = 20


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
