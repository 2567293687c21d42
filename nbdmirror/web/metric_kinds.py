"""The kinds of metrics: what they take from a record of a server's answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from nbdmirror.web.records import Record, number, records

BUCKETS = 25
"""Of a histogram, as docs/qmp.md has them."""

_ENDS = [*(f"{2.0**shift / 1e6:.6g}" for shift in range(BUCKETS - 1)), "+Inf"]
"""Their upper ends in seconds."""

LABELS: dict[str, tuple[str, ...]] = {
    "host": (),
    "any server": ("server",),
    "server": ("server",),
    "disk": ("server", "disk"),
    "job": ("server", "disk", "job_id"),  # `job` is a label of Prometheus' own
}


@dataclass(frozen=True, slots=True)
class Metric:
    """A name that ends in _total is a counter's. `of` gives a number; None where there is none, or
    one for each value of `label`."""

    name: str
    help: str
    of: Callable[[Record], float | dict[str, float] | None]
    label: str = ""

    @property
    def kind(self) -> str:
        return "counter" if self.name.endswith("_total") else "gauge"

    def family(self, level: str) -> CounterMetricFamily | GaugeMetricFamily:
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        return kind(self.name, self.help, labels=self.labels(level))

    def add(self, family: Any, labels: tuple[str, ...], record: Record) -> None:
        value = self.of(record)
        if isinstance(value, dict):
            for name, number in value.items():
                family.add_metric([*labels, name], number)
        elif value is not None and (value >= 0 or self.kind == "gauge"):
            family.add_metric(list(labels), value)

    def labels(self, level: str) -> tuple[str, ...]:
        return (*LABELS[level], self.label) if self.label else LABELS[level]


@dataclass(frozen=True, slots=True)
class Times:
    """A histogram for each record in the list `key`, by its `label`."""

    name: str
    help: str
    key: str
    label: str
    prefix: str = ""
    kind = "histogram"

    def labels(self, level: str) -> tuple[str, ...]:
        return (*LABELS[level], self.label)

    def family(self, level: str) -> HistogramMetricFamily:
        return HistogramMetricFamily(self.name, self.help, labels=self.labels(level))

    def add(self, family: Any, labels: tuple[str, ...], record: Record) -> None:
        every = {str(times.get(self.label, "")): times for times in records(record, self.key)}
        for name, times in every.items():
            buckets, seconds = (
                times.get(f"{self.prefix}buckets"),
                times.get(f"{self.prefix}seconds"),
            )
            sum_s = number(seconds)
            if not isinstance(buckets, list) or sum_s is None or sum_s < 0:
                continue
            counts = [max(0, int(number(count) or 0)) for count in buckets[:BUCKETS]]
            sums = accumulate([*counts, *[0] * (BUCKETS - len(counts))])
            family.add_metric([*labels, name], list(zip(_ENDS, sums, strict=True)), sum_s)


def key(name: str) -> Callable[[Record], float | None]:
    return lambda record: number(record.get(name))


def is_one_of(key: str, *values: object) -> Callable[[Record], float | None]:
    """1 if the key has one of the values; None where there is no such key."""
    return lambda record: float(record[key] in values) if key in record else None


def numbers(found: Record) -> dict[str, float] | None:
    numbers = {str(key): number(value) for key, value in found.items()}
    return {key: value for key, value in numbers.items() if value is not None and value >= 0}


def one_of(key: str, values: tuple[str, ...]) -> Callable[[Record], dict[str, float] | None]:
    """A series for each value, of which one is 1."""

    def of(record: Record) -> dict[str, float] | None:
        if key not in record:
            return None
        return {value: float(record[key] == value) for value in values}

    return of
