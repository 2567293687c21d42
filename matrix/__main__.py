"""`python -m matrix [--fresh] [SYSTEM ...] [-- PYTEST ARGUMENT ...]`: see docs/systems.md.

Exit status: 0 if the demo and all tests passed on each system, 1 if not, 2 for a wrong argument,
130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Sequence

from matrix import roots
from matrix.roots import CLONE, SYSTEMS, MatrixError, Root, say
from matrix.table import Outcome, as_markdown, read_versions

ASK_VERSIONS = r"""
/usr/bin/python3 -c 'import platform; print("Python", platform.python_version())'
nbdkit --version
/usr/bin/python3 -c 'import nbd; print("libnbd", nbd.NBD().get_version())'
qemu-img --version | sed -n 's/^qemu-img version/QEMU/p'
"""


def main(arguments: Sequence[str]) -> int:
    args, for_pytest = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    try:
        roots.check_machine()
        if roots.is_changed():
            say("the last commit is tried, without the changes that are not committed")
        outcomes = [_try(Root(suite), for_pytest, is_fresh=args.fresh) for suite in args.systems]
    except MatrixError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    print(f"\n{as_markdown(outcomes)}", flush=True)
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Ours, and pytest's."""
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    known = ", ".join(f"{suite} ({title})" for suite, title in SYSTEMS.items())
    parser = argparse.ArgumentParser(
        prog="./run matrix",
        usage="%(prog)s [--fresh] [SYSTEM ...] [-- PYTEST ARGUMENT ...]",
        description="Run the demo and the tests on other systems, each in a root made by "
        "debootstrap, and print a table of the results.",
    )
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=f"{known}; default: all")
    parser.add_argument("--fresh", action="store_true", help="recreate the roots that were kept")
    args = parser.parse_args(words[:cut])
    for system in args.systems:
        if system not in SYSTEMS:
            parser.error(f"{system}: no such system; there are {known}")
    args.systems = list(dict.fromkeys(args.systems or SYSTEMS))
    return args, words[cut + 1 :]


def _try(root: Root, for_pytest: list[str], *, is_fresh: bool) -> Outcome:
    """Both commands, as a user runs them there. What cannot be done here is in the outcome."""
    outcome = Outcome(root.title)
    try:
        with root.locked() as log:
            root.make(log, is_fresh=is_fresh)
            root.clone()
            say(f"{root.title}: ./run demo")
            status = root.command(log, "./run", "demo", folder=CLONE)
            outcome.demo = "passed" if status == 0 else f"failed ({status})"
            say(f"{root.title}: ./run test {' '.join(for_pytest)}".rstrip())
            root.results_path.unlink(missing_ok=True)
            results = f"--junitxml={CLONE}/.cache/{root.results_path.name}"
            words = ["./run", "test", *for_pytest]
            status = root.command(log, *words, folder=CLONE, PYTEST_ADDOPTS=results)
            outcome.read_results(root.results_path)
            if status and not (outcome.failed or outcome.problem):
                outcome.problem = f"./run test ended with status {status}; see {root.log_path}"
            versions = io.BytesIO()
            root.command(versions, "sh", "-c", ASK_VERSIONS)
            outcome.versions = read_versions(versions.getvalue().decode(errors="replace"))
    except MatrixError as error:
        outcome.problem = str(error)
        say(str(error))
    return outcome


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
