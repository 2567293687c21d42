"""A job with points keeps its promise, whatever goes wrong (runmachine.py)."""

from __future__ import annotations

import pytest
from model.runmachine import RunMachine
from model.search import hold

EXAMPLES = 60


@pytest.mark.timeout(240)
def test_a_job_with_points_keeps_its_promise() -> None:
    hold(RunMachine, EXAMPLES)
