"""Each committed point is the content of its cut, whatever guests do meanwhile (cutmachine.py), and
each mutant that breaks a rule is caught (cutmutants.py)."""

from __future__ import annotations

import pytest
from model.cutmachine import CutMachine
from model.cutmutants import CUT_MUTANTS
from model.cutpower import CUT_POWER_MUTANTS, CutPowerMachine, CutPowerWorld
from model.cutworld import CutWorld
from model.search import hold, search
from support.in_parts import in_parts

EXAMPLES = 200
MUTANT_EXAMPLES_MAX = 100


@pytest.mark.timeout(240)
@in_parts(EXAMPLES)
@pytest.mark.parametrize("machine", [CutMachine, CutPowerMachine])
def test_a_point_is_the_content_of_its_cut(machine: type[CutMachine], examples: int) -> None:
    hold(machine, examples)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "mutant", [*CUT_MUTANTS, *CUT_POWER_MUTANTS], ids=lambda mutant: f"{mutant.__name__}"
)
def test_a_broken_rule_is_caught(mutant: type[CutWorld]) -> None:
    kind = CutPowerMachine if issubclass(mutant, CutPowerWorld) else CutMachine
    with pytest.raises(AssertionError):
        search(kind, mutant, MUTANT_EXAMPLES_MAX)
