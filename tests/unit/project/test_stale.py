"""What documents and docstrings name exists: files, modules' contents, environment variables; and
numbers in documents are those of the code."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from support.processes import ROOT
from support.sources import comments_of, in_one_worker, nodes_of

from nbdmirror import limits, nbd_uri
from nbdmirror.cli import common
from nbdmirror.disk.latency import SAMPLED
from nbdmirror.events import EVENTS_KEPT_MAX
from nbdmirror.nbdclient.exclusive_set import CONNECTIONS_DEFAULT
from nbdmirror.nbdclient.pool import RECONNECT_TIMEOUT_S
from nbdmirror.nbdkit_host.keepalive import KEEPALIVE_S
from nbdmirror.qmp import json_stream, mirror_commands, transaction
from nbdmirror.qmp import server as qmp_server
from nbdmirror.server import bitmaps, mirror_jobs, nodes

FOLDERS = ("nbdmirror", "plugin", "tests", "bench", "docs", "docker", "matrix", "packaging")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "nbdmirror").rglob("*.py"))
OTHERS = {"nbd.Error"}
"""Of modules that are not ours."""

NUMBERS = (
    ("cli.md", "at once, {} at most", limits.THREADS_MAX),
    ("cli.md", "default: {}, with `--cache none`", common.THREADS_DEFAULT),
    ("cli.md", "with `--cache none` {}", common.THREADS_DIRECT_DEFAULT),
    ("plugin.md", "connections to an NBD server; default {}", CONNECTIONS_DEFAULT),
    ("plugin.md", "disconnected; default {}", KEEPALIVE_S),
    ("faults.md", "closes a connection {} s after the last sign of life", KEEPALIVE_S),
    ("faults.md", "wait for the server, for {} seconds", int(RECONNECT_TIMEOUT_S)),
    ("qmp.md", "Of reads and writes one in {} is timed", SAMPLED),
    ("monitoring.md", "Of reads and writes one in {} is timed", SAMPLED),
    ("security.md", "| clients at a time | {} |", qmp_server.CLIENTS_MAX),
    ("security.md", "levels | 1 MiB, {},", json_stream.VALUE_TOKENS_MAX),
    ("security.md", f"1 MiB, {json_stream.VALUE_TOKENS_MAX:,}, {{}} |", json_stream.DEPTH_MAX),
    ("security.md", "bytes, tokens, levels | {} MiB", json_stream.VALUE_BYTES_MAX >> 20),
    ("security.md", "| errors in a row | {} |", qmp_server.ERRORS_IN_A_ROW_MAX),
    ("security.md", "client does not read | {} MiB |", qmp_server.OUTPUT_BYTES_MAX >> 20),
    ("security.md", "| events that a client has not got yet | {} |", EVENTS_KEPT_MAX),
    ("security.md", "`open-timeout` {} s at most", limits.TARGET_TIMEOUT_S_MAX),
    ("security.md", "| nodes | {} |", nodes.NODES_MAX),
    ("security.md", "concluded ones included | {} |", mirror_jobs.JOBS_MAX),
    ("security.md", "| actions of a transaction | {} |", transaction.ACTIONS_MAX),
    ("security.md", "| named bitmaps | {} |", bitmaps.BITMAPS_MAX),
    ("security.md", "a URI | {} GiB", mirror_commands.BUFFER_BYTES_MAX >> 30),
    ("security.md", "1 GiB, {}, 31", mirror_commands.JOB_ID_LENGTH_MAX),
    ("security.md", "255, {}, 1,023", nodes.NAME_LENGTH_MAX),
    ("security.md", "31, {}, 8,192", bitmaps.NAME_BYTES_MAX),
    ("security.md", "1,023, {} |", nbd_uri.URI_BYTES_MAX),
)
"""A page, what stands around a number there ({}), and the number in the code."""
WORDS = {2: "two", 9: "nine"}
VARIABLE = "NBDMIRROR_[A-Z_]+"


@functools.cache
def files() -> frozenset[str]:
    found = {path.name for path in ROOT.iterdir() if path.is_file()}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            found |= {path.name, str(path.relative_to(ROOT))}
    return frozenset(found)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in PAGES])
def test_files_that_a_page_names_exist(path: Path) -> None:
    pattern = rf"\b(?:{'|'.join(FOLDERS)})/[\w/.-]*\w\.(?:py|md|sh|toml|service)\b"
    named = set(re.findall(rf"(?<![\w/]){pattern}", path.read_text()))
    assert named <= files(), sorted(named - files())


@in_one_worker
def test_files_that_docstrings_and_comments_name_exist() -> None:
    for path in SOURCES:
        for text in comments_of(path):
            for name in re.findall(r"(?<![\w/-])(?:[\w-]+/)*[\w-]+\.(?:py|md)\b", text):
                assert name in files() or Path(name).name in files(), f"{path}: {name}"


@in_one_worker
def test_what_docstrings_name_in_modules_exists() -> None:
    """As `tracker.Tracker` or `in_flight.ANSWER_S`."""
    contents: dict[str, set[str]] = {}
    for path in SOURCES:
        names = contents.setdefault(path.stem, set())
        for node in nodes_of(path):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    for path in SOURCES:
        for text in comments_of(path):
            for module, name in re.findall(r"(?<![\w./])([a-z_]+)\.([A-Z]\w+)\b(?!\.)", text):
                is_there = name in contents.get(module, ()) or f"{module}.{name}" in OTHERS
                assert is_there, f"{path}: {module}.{name}"


@functools.cache
def variables_there() -> set[str]:
    """Environment variables that programs and tests name."""
    others = [*(ROOT / "bench").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    places = [ROOT / "run", *others, *SOURCES]
    return {name for place in places for name in re.findall(VARIABLE, place.read_text())}


@in_one_worker
@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in PAGES])
def test_environment_variables_of_pages_exist(path: Path) -> None:
    named = set(re.findall(rf"(?<!X_)\b{VARIABLE}\b", path.read_text()))
    assert not named - variables_there()


@pytest.mark.parametrize(("page", "around", "number"), NUMBERS)
def test_numbers_of_pages_are_the_codes(page: str, around: str, number: int) -> None:
    text = " ".join((ROOT / "docs" / page).read_text().split())
    forms = [f"{number:,}", str(number), WORDS.get(number, str(number))]
    assert any(around.format(form) in text for form in forms), f"{page}: {around.format(number)}"
