"""`./run matrix`: what can be told without making a system, and that nothing is left of a command
in a root."""

from __future__ import annotations

import io
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT, Finished, run
from support.waiting import WAIT_S_MAX, wait_until

from matrix import inside, machine
from matrix.roots import SYSTEMS
from matrix.table import Outcome, as_markdown, read_versions

RESULTS = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="pytest" errors="1" failures="1" skipped="3">
<testcase classname="tests.test_a" name="test_one" time="0.1" />
<testcase classname="tests.test_a" name="test_two[x]" time="0.1"><failure message="m">t</failure>
</testcase>
<testcase classname="tests.test_a" name="test_three"><error message="m">t</error></testcase>
<testcase classname="tests.test_b" name="test_four"><skipped message="no KVM">t</skipped></testcase>
<testcase classname="tests.test_b" name="test_five"><skipped message="no KVM">t</skipped></testcase>
<testcase classname="tests.test_b" name="test_six"><skipped message="no ceph">t</skipped></testcase>
</testsuite></testsuites>
"""

SAID = """\
nbdkit: warning: something about a plugin
Python 3.13.5
nbdkit 1.42.3
libnbd 1.22.2
QEMU 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)
"""

SHARED = ("/usr", "/etc")
"""A root that is made of this machine's programs is there at once."""


def matrix(*arguments: str) -> Finished:
    return run("env", f"--chdir={ROOT}", sys.executable, "-m", "matrix", *arguments, check=False)


def test_the_table(tmp_path: Path) -> None:
    (tmp_path / "results.xml").write_text(RESULTS)
    tried = Outcome("Debian 13", read_versions(SAID), demo="passed")
    tried.read_results(tmp_path / "results.xml")
    untried = Outcome("Debian 14", problem="needs debootstrap, which is not installed")
    assert as_markdown([tried, untried]).splitlines() == [
        "| System | Python | nbdkit | libnbd | QEMU | `./run demo` | Passed | Failed | Skipped |",
        "|---|---|---|---|---|---|---|---|---|",
        "| Debian 13 | 3.13.5 | 1.42.3 | 1.22.2 | 10.0.13 | passed | 1 | 2 | 3 |",
        "| Debian 14 | - | - | - | - | - | 0 | 0 | 0 |",
        "",
        "- Debian 13, failed: tests.test_a.test_two[x]",
        "- Debian 13, failed: tests.test_a.test_three",
        "- Debian 13, skipped 2: no KVM",
        "- Debian 13, skipped 1: no ceph",
        "- Debian 14: needs debootstrap, which is not installed",
    ]
    assert not tried.is_good
    assert not untried.is_good


def test_the_table_in_the_readme() -> None:
    """A row for each system, on which everything passed."""
    head = as_markdown([]).splitlines()[0]
    lines = (ROOT / "README.md").read_text().splitlines()
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[lines.index(head) + 2 :])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[0] for row in rows] == list(SYSTEMS.values())
    for _, *versions, demo, passed, failed, _ in rows:
        assert all(re.match(r"\d+(\.\d+)+", version) for version in versions)
        assert (demo, failed) == ("passed", "0") and int(passed) > 6000


@pytest.mark.parametrize(
    ("outcome", "is_good"),
    [
        (Outcome("a", demo="passed", passed=1), True),
        (Outcome("a", demo="failed (1)", passed=1), False),
        (Outcome("a", demo="passed", passed=0), False),
        (Outcome("a", demo="passed", passed=1, failed=["b"]), False),
        (Outcome("a", demo="passed", passed=1, problem="lint"), False),
    ],
)
def test_a_system_is_good_if_both_commands_passed(outcome: Outcome, is_good: bool) -> None:
    assert outcome.is_good is is_good


@pytest.mark.parametrize("content", [None, "", "<testsuites><testcase"])
def test_tests_that_ended_without_results_have_not_passed(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "results.xml").write_text(content)
    outcome = Outcome("a", demo="passed")
    outcome.read_results(tmp_path / "results.xml")
    assert outcome.problem
    assert not outcome.is_good


def test_an_unknown_system_is_refused_with_those_that_there_are() -> None:
    done = matrix("trixie", "woody", "--", "-k", "word")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert "woody" in last
    assert all(system in last for system in SYSTEMS)


def test_without_roots_rights_nothing_is_begun() -> None:
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from matrix import roots\n"
    code += "try: roots.check_machine()\nexcept roots.MatrixError as error: sys.exit(str(error))"
    done = run(*(user if os.geteuid() == 0 else []), "/usr/bin/python3", "-c", code, check=False)
    if "No module named" in done.stderr:
        pytest.skip("the checkout is not readable for other users")
    assert (done.returncode, done.stderr) == (
        1,
        "needs root, for debootstrap and namespaces: sudo ./run matrix\n",
    )


# The machine's ways to packages


def test_the_machines_ways_to_packages_are_known_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels, index = tmp_path / "wheels", tmp_path / "index"
    for folder in (wheels, index / "simple", tmp_path / "root"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("SECRET_TOKEN", "no business of theirs")
    (tmp_path / ".pip").mkdir()
    (tmp_path / ".pip" / "pip.conf").write_text(
        f"[global]\nextra-index-url = file://{index}/simple\n"
    )
    found = machine.environment()
    assert found["https_proxy"] == "http://proxy.example:3128"
    assert found["HOME"] == "/root"
    assert "SECRET_TOKEN" not in found
    assert {str(wheels), str(index)} <= set(machine.shared(tmp_path / "root"))


# Inside


@pytest.fixture
def root(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("only root can enter a root")
    for name in ("dev", "etc", "proc", "run", "sys", "tmp", "usr", "var/tmp"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (tmp_path / name).symlink_to(f"usr/{name}")
    return tmp_path


def enter(root: Path, code: str) -> tuple[int, str]:
    log = io.BytesIO()
    argv = inside.entering(root, "sh", "-c", code, shared=SHARED)
    status = inside.run(argv, {"PATH": inside.PATH}, log)
    return status, log.getvalue().decode()


def test_a_root_is_as_a_machine_that_was_booted(root: Path) -> None:
    (root / "tmp" / "old").touch()
    code = r"""
        set -e
        [ "$(readlink /proc/self/root)" = / ] && [ "$(cd /; pwd -P)" = / ]
        /usr/bin/python3 -c 'import os; print(os.ttyname(os.openpty()[1]))'
        unshare --mount sh -c 'mount --make-rprivate / && mount -t tmpfs x /tmp && echo mounted'
        ls /tmp /run/lock
        cut -d " " -f 1,5 /proc/1/stat
        echo x >/dev/shm/x && echo x >/dev/null
        touch /usr/x 2>/dev/null || echo read-only
        exit 3
    """
    status, said = enter(root, code)
    assert (status, said.splitlines()) == (
        3,
        ["/dev/pts/0", "mounted", "/run/lock:", "", "/tmp:", "1 0", "read-only"],
    )


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_command_that_is_interrupted(root: Path, sent: int) -> None:
    """Neither of its processes, those that hide from their parents among them, nor of mounts."""
    code = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from matrix import inside
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)
hidden = "setsid -f sh -c 'sleep 1000; :' {root} >/dev/null 2>&1; "
hidden += "trap '' INT TERM; echo up; sleep 1000; :"
argv = inside.entering({str(root)!r}, "sh", "-c", hidden, shared={SHARED!r})
inside.run(argv, {{"PATH": inside.PATH}}, open("/dev/null", "wb"))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    assert inhabitants(root)
    process.send_signal(sent)
    assert process.wait(WAIT_S_MAX) != 0
    process.stdout.close()
    wait_until(lambda: not inhabitants(root), "all of its processes have ended")
    assert str(root) not in Path("/proc/self/mounts").read_text()


def inhabitants(root: Path) -> list[str]:
    """Processes that have the name of `root` in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if str(root).encode() in words and process.name != str(os.getpid()):
            found.append(process.name)
    return found
