"""The mirror's invariant holds (machine.py), and each mutant that breaks a rule is caught
(mutants.py): a test that lets a mutant pass proves nothing about the real code."""

from __future__ import annotations

import pytest
from model.finemachine import FineMachine
from model.finemutants import FINE_MUTANTS
from model.lagmachine import LagMachine, LosingLagMachine
from model.lagmutants import LAG_MUTANTS
from model.machine import LosingMachine, MirrorMachine
from model.mutants import MUTANTS
from model.search import hold, search
from model.world import World
from support.in_parts import in_parts

ALL_MUTANTS = (*MUTANTS, *FINE_MUTANTS, *LAG_MUTANTS)

EXAMPLES = 300
MUTANT_EXAMPLES_MAX = 250


@pytest.mark.timeout(240)
@pytest.mark.rule(4)
@pytest.mark.guarantee("The invariant")
@in_parts(EXAMPLES)
@pytest.mark.parametrize("machine", [MirrorMachine, FineMachine, LosingMachine, LosingLagMachine])
def test_the_invariant_holds(machine: type[MirrorMachine], examples: int) -> None:
    hold(machine, examples)


@pytest.mark.guarantee("The invariant")
@pytest.mark.guarantee("A failed write counts")
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mutant", ALL_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_is_caught(mutant: type[World]) -> None:
    kind = LosingMachine if mutant.loses_target else MirrorMachine
    kind = FineMachine if mutant in FINE_MUTANTS else kind
    if mutant in LAG_MUTANTS:
        kind = LosingLagMachine if mutant.loses_target else LagMachine
    with pytest.raises(AssertionError):
        search(kind, mutant, MUTANT_EXAMPLES_MAX)
