"""Random tests in two parts: a tenth of their examples for `./run test --unit`, and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy

QUICK = 10


def in_parts(examples: int) -> pytest.MarkDecorator:
    """For a test that takes `examples`: a search with a tenth of them, which takes a second, for
    `./run test --unit`, and one with the others."""
    return _with_examples(examples // QUICK, examples - examples // QUICK, "others")


def given_in_parts(
    examples: int, *strategies: SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[[int], None]]:
    """In place of Hypothesis' `given`, for a test without fixtures. The examples are the same each
    time; the quick ones are the first of all."""

    def decorate(test: Callable[..., None]) -> Callable[[int], None]:
        @_with_examples(examples // QUICK, examples, "all")
        def run(examples: int) -> None:
            drawn = given(*strategies)(test)
            settings(max_examples=examples, derandomize=True)(drawn)()

        run.__doc__ = test.__doc__
        return run

    return decorate


def _with_examples(quick: int, slow: int, name: str) -> pytest.MarkDecorator:
    later = pytest.param(slow, id=name, marks=pytest.mark.slow)
    return pytest.mark.parametrize("examples", [pytest.param(quick, id="some"), later])
