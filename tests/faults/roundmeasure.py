"""What is measured in a round of trouble (rounds.py): what was sent to the target again, and what
may have been; how long a guest waits; that two sides are equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from faults.roundplan import GRANULE, IN_FLIGHT_BYTES, REGION, SIZE, Waits
from faults.roundscene import Scene
from support.images import Content, MiB, assert_identical
from support.losing import CHANGES, Lossy, Range
from support.waiting import WAIT_S_MAX, wait_until

PROBE, PROBE_OFFSET = Path(__file__).with_name("probe.py"), 14 * MiB


class Measured(Scene):
    """A round that knows what it may send again, and looks whether it has."""

    @property
    def _does_not_notice(self) -> bool:
        """The guest does not pay for the target's trouble."""
        is_mirror = self.cell.phase in ("first copy", "READY")
        is_of_target = self.cell.what in ("target", "link", "nothing")
        return is_mirror and is_of_target and not self.plan.is_write_blocking

    @property
    def _regions_count(self) -> bool:
        """After the server's end the log of intents counts: the disk's NBD server may have lost
        what guests had not flushed."""
        is_on_nbd = self.source is not None and self.cell.what in ("server", "both")
        return self.plan.is_power_cut or is_on_nbd

    def _wait_pivoted(self) -> None:
        self.qmp.wait_completed()
        self.is_pivoted = True

    def _catch_up(self) -> None:
        if not self.is_pivoted:
            self.qmp.execute("block-job-set-speed", device="j", speed=0)
            self._wait_caught_up()

    def _wait_caught_up(self) -> None:
        left_bytes_max = GRANULE if self.probe else 0  # which the probe writes to again and again

        def is_level() -> bool:
            job = self.qmp.job()
            return bool(job["ready"] and job["len"] - job["offset"] <= left_bytes_max)

        wait_until(is_level, "the mirror has caught up")

    def _start_probe(self) -> None:
        self.guest.touched.append((PROBE_OFFSET, GRANULE))
        self.probe = subprocess.Popen(
            [sys.executable, str(PROBE), self.guest.uri, str(PROBE_OFFSET)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.probe.stdout is not None
        assert self.probe.stdout.readline() == "ready\n"

    def _end_probe(self) -> None:
        if self.probe is not None:
            said, _ = self.probe.communicate(timeout=WAIT_S_MAX)
            assert self.probe.returncode == 0, "the probe's requests failed"
            self.outcome.waits, self.probe = Waits(**json.loads(said)), None

    def _offset(self) -> int:
        if self.is_pivoted:
            return 0
        return next((int(j["offset"]) for j in self.qmp.execute("query-block-jobs")), 0)

    def _identical(self, one: Content, other: Content) -> None:
        assert_identical(one, other)
        self.outcome.compared_bytes += SIZE

    def _may_differ(self, lost_at: int) -> set[int]:
        """The granules that may be sent again: what guests have written to since READY (or the
        regions); in the first copy, what had not been sent and flushed."""
        unit = REGION if self._regions_count else GRANULE
        touched = _units([_round_out(*one, unit) for one in self.guest.touched])
        if self.cell.phase != "first copy":
            return touched
        return touched | (_units([(0, SIZE)]) - self._flushed(lost_at))

    def _flushed(self, lost_at: int) -> set[int]:
        """The least that must count as flushed: of what was sent before the last flush but one,
        since the last may not have been answered, all but what may have been in flight then. In
        write-blocking mode guests' flushes reach the target too, and count for nothing."""
        plan = self.plan
        if self._regions_count or plan.is_write_blocking or not isinstance(self.target, Lossy):
            return set()
        requests = self.target.requests()[:lost_at]
        flushes = [index for index, (kind, _, _) in enumerate(requests) if kind == "flush"]
        before = requests[: flushes[-2]] if len(flushes) > 1 else []
        sent = [(offset, length) for kind, offset, length in before if kind in CHANGES]
        in_flight = 0
        while sent and in_flight < IN_FLIGHT_BYTES:
            in_flight += sent.pop()[1]
        return _units(sent)

    def _check_sent(self, lost_at: int) -> None:
        """Since then the target was sent nothing but what may differ."""
        self.outcome.had_pivoted = self.is_pivoted
        units = self._may_differ(lost_at)
        if not self.is_pivoted:
            self.outcome.bound_bytes = len(units) * GRANULE
        if isinstance(self.target, Lossy):
            stray = _units(self.target.changed(lost_at)) - units
            assert not stray, f"sent again for no reason: granules {sorted(stray)}"

    def _check_again(self) -> None:
        again = self.outcome.again_bytes
        if again is not None:
            assert again <= self.outcome.bound_bytes, self.outcome

    def _measure_since_start(self) -> None:
        """The guest rests: what is copied now is what is sent again."""
        self._catch_up()
        if not self.is_pivoted:
            self.outcome.again_bytes = self._offset()
        self._check_sent(self.lost_at)


def _round_out(offset: int, length: int, unit: int) -> Range:
    start = offset // unit * unit
    end = -(-(offset + length) // unit) * unit
    return start, min(end, SIZE) - start


def _units(ranges: list[Range]) -> set[int]:
    """Numbers of granules."""
    return {
        unit
        for offset, length in ranges
        for unit in range(offset // GRANULE, -(-(offset + length) // GRANULE))
    }
