"""The architecture as a test: which room may import which, and how long a thing may grow.

The tables below are the rules; docs/design.md has their reasons.
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
from support.sources import in_one_worker, tree_of

pytestmark = in_one_worker
ROOT = Path(__file__).resolve().parents[3]

LEAVES = ""
"""The room of what lies in nbdmirror/ itself."""
# Room -> the rooms below it that it may import from, lazily or not, for types or not.
MAY_IMPORT = {
    LEAVES: (),
    "devices": (LEAVES,),
    "nbdclient": (LEAVES, "devices"),
    "points": (LEAVES, "devices"),  # knows neither libnbd nor the disk that is served
    "disk": (LEAVES, "devices"),
    "mirror": (LEAVES, "devices", "disk"),  # knows neither libnbd nor the state directory
    "state": (LEAVES, "devices", "disk", "nbdclient.sides"),
    "server": (LEAVES, "devices", "nbdclient", "points", "disk", "mirror", "state"),
    "qmp": (LEAVES, "devices", "nbdclient", "disk", "mirror", "state", "server"),
    "nbdkit_host": (
        LEAVES,
        "devices",
        "nbdclient",
        "points",
        "disk",
        "mirror",
        "state",
        "server",
        "qmp",
    ),
    "web": (
        LEAVES,
        "cli.words",
        "cli.progress",
        "cli.status",
        "cli.disk_map",
    ),  # the words; it knows no QMP
    "cli": (
        LEAVES,
        "nbdclient.tls",
        "web",
        "points",
        "devices.base",
        "devices.file",
        "nbdclient.device",
        "nbdclient.pair",
    ),  # the last ones for journals, without a server
}

# Module from outside -> the only places that may import it.
ONLY_IN = {
    "nbd": "nbdclient.*",
    "nbdkit": "plugin/*",
    "asyncio": "qmp.* cli.* nbdkit_host.process web.*",
    "socket": "nbdclient.* nbdkit_host.* qmp.server cli.* identity nbd_uri resolver unix_sockets"
    " log_lines web.service",
    "socketserver": "",
    "select": "event_loop nbdclient.* cli.* log_lines",
    "selectors": "event_loop nbdclient.*",
    "qemu": "cli.*",
    "rich": "cli.*",
    "starlette": "web.*",
    "uvicorn": "web.service",
    "prometheus_client": "web.metrics web.metric_kinds",
    "jinja2": "web.page",
}

# Module from outside -> the places that may not import it: there it is injected, so that a test
# can hold it still.
NOT_IN = {
    "time": "disk.* mirror.copier mirror.job mirror.mirror_job mirror.quiesce mirror.timers",
    "datetime": "disk.* mirror.copier mirror.job",
    "random": "disk.* mirror.copier mirror.job",
    "secrets": "disk.* mirror.copier mirror.job",
}

MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 50

# Name as the failure prints it -> why it is allowed to be longer.
LONG_MODULES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

# What the command line's client commands must do without, to start fast and to run on a machine
# that has no NBD software.
WEB = ("starlette", "uvicorn", "prometheus_client", "jinja2")
NOT_IN_A_CLIENT = ("nbd", "libnbdmod", "nbdkit", "rich", "bitarray", *WEB)


def source_files() -> dict[str, Path]:
    """The modules' names, as the tables have them ("mirror.copier"), and their files."""
    package = ROOT / "nbdmirror"
    found = {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in package.rglob("*.py")
    }
    plugins = {f"plugin/{path.stem}": path for path in (ROOT / "plugin").glob("*.py")}
    return dict(sorted((found | plugins).items()))


class Trees(dict[str, ast.Module]):
    """The modules' syntax trees, each parsed when it is first asked for: all workers collect this
    file, and one of them runs its tests."""

    def __missing__(self, name: str) -> ast.Module:
        self[name] = tree_of(FILES[name])
        return self[name]


FILES = source_files()
TREES = Trees()
FREE = ("__init__", "__main__", "plugin/nbdmirror-plugin")
"""Belong to no room."""


def matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())


def room_of(name: str) -> str:
    return name.partition(".")[0] if "." in name else LEAVES


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
    """Modules of nbdmirror that are imported, but for `__version__`."""
    ours = set()
    for name in imports(tree):
        package, _, rest = name.partition(".")
        while package == "nbdmirror" and rest and rest != "__version__":
            if rest in FILES:
                ours.add(rest)
                break
            rest = rest.rpartition(".")[0]
    return ours


def imports_from_outside(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)} - {"nbdmirror"}


ROOMS = pytest.mark.parametrize("room", sorted({room_of(name) for name in FILES}))
"""A test looks at all modules of a room: a thousand tests of a module each took seconds."""


def modules_of(room: str) -> list[str]:
    return [name for name in FILES if room_of(name) == room]


def check_imports_from_us(name: str) -> None:
    room = room_of(name)
    assert room in MAY_IMPORT, f"{room} is new here: give it a row in MAY_IMPORT"
    for used in sorted(imports_from_us(TREES[name])):
        allowed = room_of(used) == room or {room_of(used), used} & set(MAY_IMPORT[room])
        assert allowed, f"{name} must not import {used}; rooms below it: {MAY_IMPORT[room]}"


@ROOMS
def test_rooms_import_from_rooms_below_them(room: str) -> None:
    for name in modules_of(room):
        if name not in FREE:
            check_imports_from_us(name)


def test_rooms_say_what_they_are_for_and_nothing_else() -> None:
    for room in MAY_IMPORT:
        if room != LEAVES:
            (docstring,) = TREES[f"{room}.__init__"].body
            assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)


def check_imports_from_outside(name: str) -> None:
    used = imports_from_outside(TREES[name])
    for module in sorted(used & ONLY_IN.keys()):
        assert matches(name, ONLY_IN[module]), f"{name} imports {module}: only {ONLY_IN[module]}"
    for module in sorted(used & NOT_IN.keys()):
        assert not matches(name, NOT_IN[module]), f"{name} imports {module}: have it injected"


@ROOMS
def test_imports_from_outside_stay_behind_their_fences(room: str) -> None:
    for name in modules_of(room):
        check_imports_from_outside(name)


@ROOMS
def test_modules_stay_short(room: str) -> None:
    lines = {name: len(FILES[name].read_text().splitlines()) for name in modules_of(room)}
    long = {name for name, count in lines.items() if count >= MODULE_LINES_MAX} - set(LONG_MODULES)
    assert not long, "is there a room of its own in each?"


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


@ROOMS
def test_functions_stay_short(room: str) -> None:
    lengths = {
        f"{name}:{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for name in modules_of(room)
        for node in functions(TREES[name])
    }
    too_long = {
        function: lines
        for function, lines in lengths.items()
        if lines >= FUNCTION_LINES_MAX and function not in LONG_FUNCTIONS
    }
    assert not too_long


def test_no_interrupt_is_lost() -> None:
    """Before Python 3.12 asyncio.wait_for forgets that it was cancelled if what it waits for comes
    at the same moment: an interrupted command went on. asyncio.timeout does not."""
    package = ROOT / "nbdmirror"
    users = [path for path in package.rglob("*.py") if "asyncio.wait_for(" in path.read_text()]
    assert users == []


def test_no_path_becomes_another_files() -> None:
    """These remove `link/..` as text; the kernel follows the link first. `absolute_path` does
    not."""
    named = ("abspath", "normpath")
    users = [name for name in FILES for node in ast.walk(TREES[name]) if word_of(node) in named]
    assert users == []


def test_the_resolver_is_asked_in_one_place() -> None:
    """Python's library may wait for minutes, and raises a UnicodeError for nbd://a..b/. The second
    place is for the name of an own address, which nbdkit resolves as well."""
    named = ("getaddrinfo", "gethostbyname", "create_connection")
    users = {name for name in FILES for node in ast.walk(TREES[name]) if word_of(node) in named}
    assert users == {"resolver", "cli.places"}


def word_of(node: ast.AST) -> str:
    """The last part of a name, wherever the name comes from."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def test_allowances_that_nobody_needs_are_gone() -> None:
    known_functions = {f"{name}:{node.name}" for name in FILES for node in functions(TREES[name])}
    assert set(LONG_MODULES) <= set(FILES)
    assert set(LONG_FUNCTIONS) <= known_functions


def test_client_commands_need_no_nbd_software(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from nbdmirror.cli.main import main\n"
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
        ("disk.bitmap", "from nbdmirror.errors import Error", False),
        ("disk.bitmap", "from nbdmirror import __version__", False),
        ("disk.ledger", "def f():\n    from nbdmirror.mirror import copier", True),
        ("mirror.copier", "import nbdmirror.nbdclient.pool", True),
        ("mirror.job", "from nbdmirror.state.store import DiskStore", True),
        ("mirror.job", "from nbdmirror.mirror.group import Group", False),
        ("errors", "from nbdmirror.devices import base", True),
        ("a_new_room.module", "", True),
        ("cli.serve", "from nbdmirror.nbdclient import tls", False),
        ("cli.serve", "from nbdmirror.nbdclient import pool", True),
    ],
)
def test_the_table_bites(name: str, source: str, broken: bool) -> None:
    assert breaks(check_imports_from_us, name, source) is broken


@pytest.mark.parametrize(
    ("name", "source", "broken"),
    [
        ("nbdclient.device", "import nbd", False),
        ("mirror.job", "import nbd", True),
        ("server.server", "import nbdkit", True),
        ("plugin/nbdmirror-plugin", "import nbdkit", False),
        ("mirror.copier", "from time import monotonic", True),
        ("state.store", "import time", False),
        ("mirror.job", "import asyncio.events", True),
    ],
)
def test_the_fences_bite(name: str, source: str, broken: bool) -> None:
    assert breaks(check_imports_from_outside, name, source) is broken
