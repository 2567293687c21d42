"""Tests run side by side but for those that must run alone, and nothing is left of a run that was
interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT, has_ended
from support.waiting import WAIT_S_MAX, wait_until

CONFTEST = 'pytest_plugins = ["support.side_by_side"]\n'

TESTS = """
from pathlib import Path
import pytest
from support.waiting import wait_until

PLACE = Path(__file__).parent

@pytest.mark.alone
@pytest.mark.parametrize("number", range(4))
def test_alone(number):
    assert (PLACE / "met").exists(), "the others come first"
    (PLACE / "only").touch(exist_ok=False)
    assert not list(PLACE.glob("running*"))
    (PLACE / "only").unlink()

@pytest.mark.parametrize("number", range(2))
def test_they_meet(number):
    mine, other = (PLACE / f"running{n}" for n in (number, 1 - number))
    mine.touch()
    wait_until(lambda: other.exists() or (PLACE / "met").exists(), "the other one runs")
    (PLACE / "met").touch()
    mine.unlink()
"""

FOREVER = """
import subprocess, sys, time
from pathlib import Path
import pytest

@pytest.fixture
def server():
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()

@pytest.mark.parametrize("number", range(2))
def test_that_does_not_end(server, number):
    (Path(__file__).parent / f"pid{number}").write_text(str(server.pid))
    time.sleep(1000)
"""

DIES = """
import os
import pytest

@pytest.mark.parametrize("number", range(20))
def test_that_ends_its_process(number):
    if number == 5:
        os._exit(1)
"""

GROUP = """
import os
import pytest
from pathlib import Path

PLACE = Path(__file__).parent

@pytest.mark.parametrize("number", range(8))
def test_of_none(number):
    pass

@pytest.mark.xdist_group("the group")
@pytest.mark.parametrize("number", range(8))
def test_of_a_group(number):
    (PLACE / os.environ["PYTEST_XDIST_WORKER"]).touch()
"""


def pytest_run(folder: Path, tests: str) -> subprocess.Popen[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    alone\n    slow\n")
    run = (ROOT / "run").read_text()
    of_run = re.findall(r"--(?:max-worker-restart|dist|no-loadscope)\S*", run)
    assert of_run[0] == "--max-worker-restart=0"
    options = ("--numprocesses=2", *of_run, "-q")
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_those_that_must_run_alone_do(tmp_path: Path) -> None:
    with pytest_run(tmp_path, TESTS) as run:
        output = run.communicate(timeout=WAIT_S_MAX)[0]
    assert run.returncode == 0 and "6 passed" in output, output


@pytest.mark.slow
def test_a_group_runs_in_one_worker(tmp_path: Path) -> None:
    """What its tests share is made once."""
    with pytest_run(tmp_path, GROUP) as run:
        output = run.communicate(timeout=WAIT_S_MAX)[0]
    assert run.returncode == 0 and "16 passed" in output, output
    assert len(list(tmp_path.glob("gw*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the group", "its first process"])
def test_nothing_is_left_of_an_interrupted_run(tmp_path: Path, whom: str) -> None:
    """Ctrl-C on a terminal, or a signal to pytest alone."""
    with pytest_run(tmp_path, FOREVER) as run:
        places = [tmp_path / f"pid{number}" for number in range(2)]
        wait_until(lambda: all(p.exists() and p.read_text() for p in places), "both run")
        pids = [int(place.read_text()) for place in places]
        (os.killpg if whom == "the group" else os.kill)(run.pid, signal.SIGINT)
        output = run.communicate(timeout=WAIT_S_MAX)[0]
    assert run.returncode == pytest.ExitCode.INTERRUPTED, output
    wait_until(lambda: all(map(has_ended, pids)), "their servers have ended")


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run(tmp_path: Path) -> None:
    with pytest_run(tmp_path, DIES) as run:
        output = run.communicate(timeout=WAIT_S_MAX)[0]
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, output
    assert "crashed while running 'test_some.py::test_that_ends_its_process[5]'" in output
