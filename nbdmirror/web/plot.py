"""Lines over time, as the points of SVG's polylines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

WIDTH, HEIGHT = 300, 60
"""Of the picture, in the units of its points. It is scaled to the page."""
LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class Line:
    """`pieces`: a line has a gap where there was no value. `now`: the last value, if it is one of
    now."""

    pieces: list[str]
    now: float | None


@dataclass(frozen=True, slots=True)
class Plot:
    """`top`: the value at the upper edge."""

    lines: list[Line]
    top: float


def plot(
    times_s: list[float], *series: Iterable[float | None], now_s: float, span_s: float
) -> Plot:
    """The last `span_s` of series that share their times; the right edge is `now_s`."""
    all_values = [list(values) for values in series]
    top = max((v for values in all_values for v in values if v is not None), default=0.0)
    lines = []
    for values in all_values:
        pieces: list[list[str]] = [[]]
        for time_s, value in zip(times_s, values, strict=True):
            if value is None:
                pieces.append([])
            elif (x := WIDTH * (1 - (now_s - time_s) / span_s)) >= 0:
                y = HEIGHT * (1 - value / max(top, LEAST))
                pieces[-1].append(f"{x:.1f},{y:.1f}")
        drawn = [" ".join(_visible(piece)) for piece in pieces if piece]
        lines.append(Line(drawn, values[-1] if values else None))
    return Plot(lines, top)


def _visible(points: list[str]) -> list[str]:
    """One point alone would be none."""
    return points if len(points) > 1 else points * 2
