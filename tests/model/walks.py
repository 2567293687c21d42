"""Walks of a state machine: its rules in a random order, with random arguments, drawn by Python's
generator.

Hypothesis remembers each choice, so that it can find the fewest steps to a failure, and needs as
much time for that as the machines need for the steps. A search for a mutant needs no fewest steps.
"""

from __future__ import annotations

import inspect
from functools import cache
from random import Random
from typing import Any

from hypothesis.stateful import INITIALIZE_RULE_MARKER, INVARIANT_MARKER, RULE_MARKER
from model.choices import draw


def walk(kind: type, number: int, steps_max: int) -> None:
    """The walk of this number: the same each time, and the same for a mutant's machine until that
    differs. Some rules are rare in it, or absent."""
    noise = Random(number)
    beginnings = _marked(kind, INITIALIZE_RULE_MARKER)
    rules = _marked(kind, RULE_MARKER)
    invariants = _marked(kind, INVARIANT_MARKER)
    weights = [noise.random() ** 2 if noise.random() < 0.8 else 0.0 for _ in rules]
    machine = kind()
    try:
        for rule in beginnings:
            _take(machine, rule, noise)
        _check(machine, invariants)
        for _ in range(noise.randint(1, steps_max)):
            possible = [
                weight if weight and _may(machine, rule) else 0.0
                for rule, weight in zip(rules, weights, strict=True)
            ]
            if not any(possible):
                break
            _take(machine, noise.choices(rules, possible)[0], noise)
            _check(machine, invariants)
    finally:
        machine.teardown()


@cache
def _marked(kind: type, marker: str) -> list[Any]:
    """What Hypothesis' decorators have left at the methods."""
    found = (getattr(method, marker, None) for _, method in inspect.getmembers(kind))
    return [one for one in found if one is not None]


def _may(machine: Any, rule: Any) -> bool:
    return all(condition(machine) for condition in rule.preconditions)


def _take(machine: Any, rule: Any, noise: Random) -> None:
    rule.function(machine, **{name: draw(one, noise) for name, one in rule.arguments.items()})


def _check(machine: Any, invariants: list[Any]) -> None:
    for invariant in invariants:
        if _may(machine, invariant):
            invariant.function(machine)
