"""What a round of trouble (rounds.py) is to be: what is hit, in which phase of a mirror, whether
the guest is busy, what the seed chooses beside that, and what came of it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import product

from support.images import KiB, MiB

SIZE = 16 * MiB
GRANULE = 64 * KiB
REGION = MiB
"""Of the log of intents, for a disk of this size."""
ZONES = [(1 * MiB, 2 * MiB), (10 * MiB, 2 * MiB)]
"""Where the guest writes: a quarter of the disk, so that a full copy is told from less."""
FIRST_COPY_BYTES_PER_S = 16 * MiB
RECONNECT_S = 20
ENDING_S = 0.06
"""What an ending takes at most, as a rule: the moments to choose from, most of them early."""
IN_FLIGHT_BYTES = 5 * MiB
"""What the copier has in flight at most, to a quick target."""

WHATS = ("guest", "server", "target", "link", "both")
PHASES = ("first copy", "READY", "completing", "pivoted")
GUESTS = ("idle", "busy")
TROUBLES = ("reset", "half close", "stall", "stall and reset")
STEPS_MAX = 8
"""More than an ending has."""


@dataclass(frozen=True, slots=True)
class Cell:
    what: str
    phase: str
    guest: str

    def __str__(self) -> str:
        return f"{self.what}, {self.phase}, {self.guest}"


CELLS = [Cell(*cell) for cell in product(WHATS, PHASES, GUESTS)]
CALM = [Cell("nothing", phase, "busy") for phase in ("first copy", "READY")]
"""To compare the guest's waits with."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the seed has chosen."""

    target: str
    source: str
    is_over_tcp: bool
    is_power_cut: bool
    trouble: str
    first: str
    ending: str
    guest_goes_on: bool
    has_quick_flushes: bool
    is_ordered: bool
    """The forgetful target kills itself at one of its next requests."""
    is_write_blocking: bool
    step: int | None
    """At which step of an ending the server kills itself; None: it is killed at some moment."""
    looks_at_target_first: bool
    moment: float
    """From 0 to 1."""
    requests: int
    """Of the guest, before."""

    @classmethod
    def of(cls, cell: Cell, noise: random.Random) -> Plan:
        hits_server = cell.what in ("server", "both")
        is_power_cut = hits_server and noise.random() < 0.5
        is_lossy = noise.random() < 0.65
        return cls(
            target="lossy" if is_lossy else "qemu-nbd",
            source="lossy" if noise.random() < (0.4 if is_power_cut else 0.15) else "file",
            is_over_tcp=noise.random() < 0.25 or cell.what == "link",
            is_power_cut=is_power_cut,
            trouble=noise.choice(TROUBLES),
            first=noise.choice(("server", "target")),
            ending=noise.choice(("block-job-complete", "block-job-cancel")),
            guest_goes_on=noise.random() < 0.5,
            has_quick_flushes=noise.random() < 0.4,
            is_ordered=cell.what == "target" and is_lossy and noise.random() < 0.6,
            is_write_blocking=noise.random() < 0.2 and cell.what != "nothing",
            step=noise.choice((*range(STEPS_MAX), *(None,) * STEPS_MAX)),
            looks_at_target_first=noise.random() < 0.4,
            moment=noise.random(),
            requests=noise.randint(10, 120),
        )


@dataclass(frozen=True, slots=True)
class Waits:
    """What probe.py says."""

    requests: int
    longest_s: float
    over: int


@dataclass(slots=True)
class Outcome:
    cell: Cell
    seed: int
    plan: Plan
    again_bytes: int | None = None
    """Sent to the target again; None if the guest wrote meanwhile, or nothing was mirrored."""
    bound_bytes: int = 0
    had_pivoted: bool = False
    waits: Waits | None = None
    """Of a guest that does nothing else, from before the trouble until the target had caught up;
    where it is not to notice."""
    took_s: float = 0.0
    requests: int = 0
    """Of the guest."""
    compared_bytes: int = 0
    """Of two sides that must be equal, and what the guest has read."""
    hits: Counter[str] = field(default_factory=Counter)
    """Kind -> how often."""

    def __str__(self) -> str:
        again = "-" if self.again_bytes is None else f"{self.again_bytes // KiB} KiB"
        longest = f", longest request {self.waits.longest_s * 1000:.0f} ms" if self.waits else ""
        return (
            f"{self.cell} (seed {self.seed}): sent again {again} of at most "
            f"{self.bound_bytes // KiB} KiB{longest}; {self.plan}"
        )
