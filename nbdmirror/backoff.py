"""Backoff: how long to wait before a failed attempt is repeated."""

from __future__ import annotations


class Backoff:
    """`first_s` seconds, then twice as long each time, up to `longest_s`. For one thread."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = self._next_s = first_s
        self._longest_s = longest_s

    def next_s(self) -> float:
        """The present wait, in seconds; the next one is longer."""
        pause_s, self._next_s = self._next_s, min(self._longest_s, self._next_s * 2)
        return pause_s

    def reset(self) -> None:
        """Begin with the first wait again, after a success."""
        self._next_s = self._first_s
