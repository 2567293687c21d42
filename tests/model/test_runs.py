"""A job with points keeps its promise, whatever goes wrong (runmachine.py)."""

from __future__ import annotations

import pytest
from model.runmachine import RunMachine
from model.search import hold
from support.in_parts import in_parts

EXAMPLES = 60


@pytest.mark.timeout(240)
@in_parts(EXAMPLES)
def test_a_job_with_points_keeps_its_promise(examples: int) -> None:
    hold(RunMachine, examples)
