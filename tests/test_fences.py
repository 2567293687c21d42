"""The architecture as a test: who may import whom, and how long a thing may grow.

The tables below are the rules; docs/design.md has their reasons. A new module needs a row here,
and whoever adds the row has thought about where the module stands.
"""

from __future__ import annotations

import ast
import fnmatch
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ANYTHING = "*"
# Module of nbdmirror -> the modules of nbdmirror that it may import, lazily or not, for types or
# not. A pattern ("cli*") stands for all modules that match it.
MAY_IMPORT = {
    "__init__": "",
    "errors": "",
    "events": "",
    "linux": "",
    "threadstate": "",
    "hangup": "",
    "keepalive": "hangup",
    "latecomers": "errors logs pool remote systemd",
    "signals": "",
    "startup": "",
    "quiet": "",
    "logs": "quiet",
    "systemd": "events",
    "uri": "errors",
    "names": "",
    "layers": "",
    "identity": "errors layers linux uri",
    "tls": "errors uri",
    "endpoints": "errors tls uri",
    "bitmap": "errors",
    "device": "errors",
    "imagelock": "errors",
    "file": "aligned device errors identity imagelock linux",
    "filesource": "aligned device errors file workers",
    "workers": "",
    "filewatch": "aligned device disk events file",
    "aligned": "device errors targetonly",
    "targetonly": "bitmap device errors",
    "loop": "errors",
    "peek": "",
    "handshake": "errors identity peek tcpwatch tls uri",
    "link": "device errors handshake peek tcpwatch",
    "request": "device errors",
    "connection": "device errors handshake identity loop peek request tcpwatch",
    "openlink": "device errors link",
    "linkset": "errors link",
    "pool": "connection errors handshake link linkset loop openlink",
    "tcpwatch": "",
    "blockstatus": "device handshake",
    "remote": "aligned blockstatus connection device errors handshake identity link pool"
    " request tls",
    "ledger": "bitmap device errors",
    "disk": "bitmap device errors ledger",
    "buffer": "",
    "depth": "",
    "pace": "",
    "copier": "bitmap buffer depth device errors ledger pace",
    "targetwatch": "copier loop owner",
    # The job: what it was asked, its states, its ending, and what holds them together.
    "options": "copier",
    "jobstate": "errors",
    "quiesce": "copier ledger loop",
    "stopping": "copier copymode waits",
    "copymode": "device disk ledger",
    "group": "job jobstate options",  # the first for types only
    "job": "device errors events group jobstate options",
    "owner": "device mirror",  # the latter for types only
    "mirror": "bitmap copier copymode device disk errors events group job jobstate ledger loop"
    " options owner pace quiesce stopping targetwatch waits",
    "waits": "device loop",
    "rates": "",
    "results": "jsonrecord statefile",
    "chronicle": "disk events job loop mirror options rates results",
    # What jobs are made of and live in.
    "bitmaps": "bitmap definition disk diskstate errors transient",
    "nodes": "aligned device disk errors identity linkset mirror remote",
    "detour": "device disk errors loop remote",
    "sameness": "bitmap disk ledger",
    "admission": "aligned bitmap bitmaps device disk errors file nodes options remote sides"
    " targetonly",
    "mirrors": "admission aligned bitmap bitmaps chronicle connection copier definition depth"
    " detour device disk diskstate errors events filesource jobstate ledger loop mirror nodes"
    " options pool reconnect records remote sameness scan sides statefile transient",
    "reconnect": "connection device errors ledger loop remote",
    "scan": "bitmap device",
    "records": "connection definition handshake mirror nodes options pool remote",
    # What outlives the process.
    "lasting": "bitmap",
    "statefile": "errors",
    "intentlog": "statefile",
    "journal": "intentlog statefile",
    "journaleddisk": "device disk journal",
    "jsonrecord": "statefile",
    "diskfile": "identity jsonrecord layers statefile",
    "definition": "diskfile jsonrecord statefile",
    "diskstate": "bitmap definition diskfile identity intentlog journal jsonrecord lasting"
    " statefile",
    "writer": "device errors events loop workers",
    "heartbeat": "diskfile writer",
    "checkpoint": "journal writer",
    "transient": "bitmap definition device ledger",
    "store": "bitmap checkpoint definition device diskfile diskstate heartbeat journal lasting"
    " ledger pivots statefile transient writer",
    "pivots": "definition diskfile diskstate statefile",
    "statedir": "definition diskfile diskstate errors identity intentlog lasting pivots sides"
    " statefile store",
    "sides": "connection device errors identity loop options remote uri",
    "exports": "device disk errors identity server sides targetonly",
    "oldside": "disk diskstate errors pivots sides store targetonly writer",
    "server": "aligned bitmaps chronicle device disk diskstate errors events filewatch journaleddisk"
    " linkset loop mirror mirrors nodes oldside remote results sides statefile store tcpwatch"
    " transient writer",
    # The doors. They know what is below them, never each other.
    "queries": "aligned bitmap bitmaps device disk mirror nodes remote server",
    "sockets": "errors",
    "schema": "errors",
    "qmpschema": "schema",
    "qmpresults": "jobstate qmpschema schema",
    "introspection": "qmpresults qmpschema schema",
    "actions": "admission bitmap bitmaps copier disk errors group mirror names options server",
    "statusquery": "__init__ aligned bitmaps chronicle device disk mirror queries remote results"
    " server targetonly",
    "commands": "__init__ actions endpoints errors events introspection job mirror nodes options"
    " pool qmpschema queries remote server sides statusquery",
    "qmp_json": "errors",
    "qmp": "errors events qmp_json sockets",
    "http": "errors events job server",
    "cli*": "__init__ cli* errors identity logs names sockets startup tls uri",
    "__main__": "cli*",
    # What nbdkit leads through a process's life: it opens the doors.
    "service": "__init__ aligned commands device disk diskstate errors events exports file hangup"
    " journaleddisk keepalive latecomers layers linkset loop logs names qmp remote server signals"
    " sockets startup statedir store systemd targetonly uri",
    "plugin/*": ANYTHING,
}

# Module from outside -> the only places that may import it.
ONLY_IN = {
    "nbd": "blockstatus remote pool connection link openlink handshake peek",
    "nbdkit": "plugin/*",
    "asyncio": "qmp http cli* commands service",
    "socket": "qmp http cli* connection handshake identity link sockets service hangup keepalive"
    " systemd tcpwatch tls"
    " uri",
    "socketserver": "",
    "select": "qmp http cli* loop connection handshake tcpwatch",
    "selectors": "qmp http cli* loop connection",
    "qemu": "cli*",
    "rich": "cli*",
}

# Module from outside -> the places that may not import it: there it is injected, so that a test
# can hold it still.
NOT_IN = {
    "time": "bitmap ledger disk copier job mirror quiesce",
    "datetime": "bitmap ledger disk copier job",
    "random": "bitmap ledger disk copier job",
    "secrets": "bitmap ledger disk copier job",
}

MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 50

# Name as the failure prints it -> why it is allowed to be longer.
LONG_MODULES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

# What the command line's client commands must do without, to start fast and to run on a machine
# that has no NBD software.
NOT_IN_A_CLIENT = ("nbd", "libnbdmod", "nbdkit", "rich", "bitarray")


def source_files() -> dict[str, Path]:
    """The modules' names, as the tables have them, and their files."""
    package = ROOT / "nbdmirror"
    found = {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in package.rglob("*.py")
    }
    plugins = {f"plugin/{path.stem}": path for path in (ROOT / "plugin").glob("*.py")}
    return dict(sorted((found | plugins).items()))


FILES = source_files()
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}


def matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported anywhere in the module: `a.b` for `import a.b`, and
    `a.b` for `from a import b`, whether b is a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_from_us(tree: ast.AST) -> set[str]:
    """Modules of nbdmirror that are imported; `__version__` counts as one of __init__."""
    ours = set()
    for name in imports(tree):
        package, *rest = name.split(".")
        if package == "nbdmirror":
            ours.add(rest[0] if rest and rest[0] in FILES else "__init__")
    return ours


def imports_from_outside(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)} - {"nbdmirror"}


def row_of(name: str) -> str | None:
    return next((MAY_IMPORT[row] for row in MAY_IMPORT if matches(name, row)), None)


@pytest.mark.parametrize("name", FILES)
def test_imports_within_nbdmirror_follow_the_table(name: str) -> None:
    allowed = row_of(name)
    assert allowed is not None, f"{name} is new here: give it a row in MAY_IMPORT"
    forbidden = sorted(used for used in imports_from_us(TREES[name]) if not matches(used, allowed))
    assert not forbidden, f"{name} must not import {forbidden}; it may: {allowed or 'nothing'}"


@pytest.mark.parametrize("name", FILES)
def test_imports_from_outside_stay_behind_their_fences(name: str) -> None:
    used = imports_from_outside(TREES[name])
    for module in sorted(used & ONLY_IN.keys()):
        assert matches(name, ONLY_IN[module]), f"{name} imports {module}: only {ONLY_IN[module]}"
    for module in sorted(used & NOT_IN.keys()):
        assert not matches(name, NOT_IN[module]), f"{name} imports {module}: have it injected"


@pytest.mark.parametrize("name", FILES)
def test_modules_stay_short(name: str) -> None:
    lines = len(FILES[name].read_text().splitlines())
    assert lines < MODULE_LINES_MAX or name in LONG_MODULES, (
        f"{name} has {lines} lines: is there a room of its own in it?"
    )


def test_tests_and_tools_stay_short() -> None:
    long = {}
    for folder in ("bench", "docker", "docs", "matrix", "packaging", "plugin", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            if lines >= MODULE_LINES_MAX:
                long[str(path.relative_to(ROOT))] = lines
    assert not long, "is there a room of its own in each?"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("name", FILES)
def test_functions_stay_short(name: str) -> None:
    lengths = {
        f"{name}:{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for node in functions(TREES[name])
    }
    too_long = {
        function: lines
        for function, lines in lengths.items()
        if lines >= FUNCTION_LINES_MAX and function not in LONG_FUNCTIONS
    }
    assert not too_long


def test_allowances_that_nobody_needs_are_gone() -> None:
    known_functions = {f"{name}:{node.name}" for name in TREES for node in functions(TREES[name])}
    assert set(LONG_MODULES) <= set(FILES)
    assert set(LONG_FUNCTIONS) <= known_functions


@pytest.mark.skipif("cli" not in FILES, reason="nbdmirror/cli.py is not written yet")
def test_client_commands_need_no_nbd_software(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from nbdmirror.cli import main\n"
        f"sys.argv = ['nbdmirror', 'status', '--qmp', {str(tmp_path / 'none')!r}]\n"
        "try:\n"
        "    status = main()\n"
        "except SystemExit as exit:\n"
        "    status = exit.code\n"
        f"print(status, sorted(set({NOT_IN_A_CLIENT!r}) & set(sys.modules)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.stdout.strip() == "3 []", run.stderr


def breaks(check: Callable[[str], None], name: str, source: str) -> bool:
    """Whether `check` refuses module `name` with this source."""
    original = TREES.get(name)
    TREES[name] = ast.parse(source)
    try:
        check(name)
    except AssertionError:
        return True
    else:
        return False
    finally:
        if original is None:
            del TREES[name]
        else:
            TREES[name] = original


@pytest.mark.parametrize(
    ("name", "source", "broken"),
    [
        ("bitmap", "from nbdmirror.errors import Error", False),
        ("bitmap", "def f():\n    from nbdmirror import device", True),
        ("bitmap", "import nbdmirror.device", True),
        ("bitmap", "from nbdmirror import __version__", True),
        ("a_new_module", "", True),
        ("cli_serve", "from nbdmirror import __version__, errors", False),
        ("plugin/nbdmirror-plugin", "from nbdmirror import device", False),
    ],
)
def test_the_table_bites(name: str, source: str, broken: bool) -> None:
    assert breaks(test_imports_within_nbdmirror_follow_the_table, name, source) is broken


@pytest.mark.parametrize(
    ("name", "source", "broken"),
    [
        ("remote", "import nbd", False),
        ("job", "import nbd", True),
        ("server", "import nbdkit", True),
        ("plugin/nbdmirror-plugin", "import nbdkit", False),
        ("copier", "from time import monotonic", True),
        ("store", "import time", False),
        ("job", "import asyncio.events", True),
    ],
)
def test_the_fences_bite(name: str, source: str, broken: bool) -> None:
    assert breaks(test_imports_from_outside_stay_behind_their_fences, name, source) is broken
