"""Runs of the state machines: that the rules hold, and the search for steps at which a broken rule
is caught."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from model.walks import walk

STEPS = 40
MUTANT_SEARCHES_MAX = 20
WALKS = 5
"""For each example that a search of Hypothesis' may have."""


def hold(machine: type, examples: int) -> None:
    """Run a machine whose rules hold. Hypothesis prints the steps of a failure, as they were found:
    a search for fewer steps takes longer than a test may."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def search(kind: type, mutant: type, examples_max: int) -> None:
    """Run the machine `kind` with the world `mutant`. The same steps each time, so that a search
    does not fail by bad luck. First come walks, which are quick. Several short searches of
    Hypothesis' find more than a long one, in which it keeps to what it has found interesting.

    A mutant that few walks show names the one to begin with. Where a change of the rules makes
    that another one, the search goes on, and takes longer."""
    machine: Any = type(f"{mutant.__name__}Machine", (kind,), {"world_class": mutant})
    first = getattr(mutant, "first_walk", 0)
    for number in range(first, first + WALKS * examples_max):
        _walk_beside(kind, machine, number)
    for number in range(MUTANT_SEARCHES_MAX):
        run_state_machine_as_test(
            seed(number)(machine),
            settings=settings(
                max_examples=examples_max,
                stateful_step_count=STEPS,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )


def _walk_beside(kind: type, machine: type, number: int) -> None:
    """A walk that catches the mutant is one that the rules survive: it is caught for what is broken
    in it."""
    try:
        walk(machine, number, STEPS)
    except AssertionError:
        try:
            walk(kind, number, STEPS)
        except AssertionError as error:
            raise RuntimeError(f"walk {number} fails where no rule is broken") from error
        raise
