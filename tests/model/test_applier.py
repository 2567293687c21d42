"""What a recovery makes is what the disk was, also with an applier beside the image, and at
whatever moment both begin (appliermachine.py). Each mutant that breaks a rule is caught
(appliermutants.py)."""

from __future__ import annotations

import pytest
from model.appliermachine import ApplierMachine
from model.appliermutants import APPLIER_MUTANTS
from model.applierworld import AppliedWorld
from model.search import hold, search
from support.in_parts import in_parts

EXAMPLES = 60
MUTANT_EXAMPLES_MAX = 30


@pytest.mark.guarantee("A point is the disk of one moment")
@pytest.mark.timeout(240)
@in_parts(EXAMPLES)
def test_each_point_is_what_the_disk_was(examples: int) -> None:
    hold(ApplierMachine, examples)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mutant", APPLIER_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_is_caught(mutant: type[AppliedWorld]) -> None:
    with pytest.raises(AssertionError, match="lost"):
        search(ApplierMachine, mutant, MUTANT_EXAMPLES_MAX)
