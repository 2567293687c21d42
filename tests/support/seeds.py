"""The seed of a run's random tests: a new one each time, unless the environment has one. Workers of
one run inherit it, so all draw the same."""

from __future__ import annotations

import os
import random
import sys

NAME = "NBDMIRROR_SEED"
SEED = int(os.environ.setdefault(NAME, str(random.SystemRandom().randrange(1_000_000))))


def print_seed() -> None:
    """pytest shows it with a failure."""
    sys.stdout.write(f"{NAME}={SEED}\n")
