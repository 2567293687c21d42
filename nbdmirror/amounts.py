"""Amounts as people read them."""

from __future__ import annotations


def size(number: float) -> str:
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop()
    digits = 1 if number % 1 and number < 100 else 0
    return f"{number:.{digits}f} {units[-1]}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
