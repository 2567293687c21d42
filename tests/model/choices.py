"""What the rules of state machines draw: Hypothesis' strategies, each with a quick way to draw the
same from Python's generator (walks.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

T = TypeVar("T")

_draws: dict[SearchStrategy[Any], Callable[[Random], Any]] = {}


def draw(strategy: SearchStrategy[Any], noise: Random) -> Any:
    return _draws[strategy](noise)


def sampled_from(values: Sequence[T]) -> SearchStrategy[T]:
    return _known(st.sampled_from(values), lambda noise: noise.choice(values))


def booleans() -> SearchStrategy[bool]:
    return _known(st.booleans(), lambda noise: noise.random() < 0.5)


def integers(least: int, most: int) -> SearchStrategy[int]:
    return _known(st.integers(least, most), lambda noise: noise.randint(least, most))


def lists(one: SearchStrategy[T], *, max_size: int) -> SearchStrategy[list[T]]:
    return _known(
        st.lists(one, max_size=max_size),
        lambda noise: [draw(one, noise) for _ in range(noise.randint(0, max_size))],
    )


def tuples(first: SearchStrategy[Any], second: SearchStrategy[Any]) -> SearchStrategy[Any]:
    return _known(st.tuples(first, second), lambda noise: (draw(first, noise), draw(second, noise)))


def _known(strategy: SearchStrategy[T], quick: Callable[[Random], T]) -> SearchStrategy[T]:
    _draws[strategy] = quick
    return strategy
