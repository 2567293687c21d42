"""The mirror's invariant holds (machine.py), and each mutant that breaks a rule is caught
(mutants.py): a test that lets a mutant pass proves nothing about the real code."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from model.finemachine import FineMachine
from model.finemutants import FINE_MUTANTS
from model.machine import LosingMachine, MirrorMachine
from model.mutants import MUTANTS
from model.world import World

STEPS = 40
EXAMPLES = 300
MUTANT_SEARCHES_MAX = 20
MUTANT_EXAMPLES_MAX = 250


@pytest.mark.timeout(240)
@pytest.mark.rule(4)
@pytest.mark.guarantee("The invariant")
@pytest.mark.parametrize("machine", [MirrorMachine, FineMachine, LosingMachine])
def test_the_invariant_holds(machine: type[MirrorMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.guarantee("The invariant")
@pytest.mark.guarantee("A failed write counts")
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mutant", [*MUTANTS, *FINE_MUTANTS], ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_is_caught(mutant: type[World]) -> None:
    """The same steps each time, so that this does not fail by bad luck. Several short searches find
    more than a long one, in which Hypothesis keeps to what it has found interesting."""
    kind = LosingMachine if mutant.loses_target else MirrorMachine
    kind = FineMachine if mutant in FINE_MUTANTS else kind
    machine: Any = type(f"{mutant.__name__}Machine", (kind,), {"world_class": mutant})

    def search() -> None:
        for number in range(MUTANT_SEARCHES_MAX):
            run_state_machine_as_test(
                seed(number)(machine),
                settings=settings(
                    max_examples=MUTANT_EXAMPLES_MAX,
                    stateful_step_count=STEPS,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                ),
            )

    with pytest.raises(AssertionError):
        search()
