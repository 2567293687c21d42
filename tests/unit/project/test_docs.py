"""The documentation says what there is: commands, arguments, options, events, modules, tests; and
the README's tour works as it is written."""

from __future__ import annotations

import argparse
import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.goldenstate import CASES, Golden
from support.images import assert_identical
from support.processes import ROOT
from support.qmpsignatures import signature
from support.recipes import ran, script_of
from support.shown import shown
from support.sources import in_one_worker, tree_of
from support.staterecords import FILES, PLACES, Steps, path_of

from nbdmirror.cli.main import build_parser
from nbdmirror.errors import ConfigError
from nbdmirror.nbdkit_host.process import PluginProcess
from nbdmirror.qmp.commands import COMMANDS
from nbdmirror.qmp.results import EVENTS
from nbdmirror.qmp.schema import Array, Enum, StringOr, Struct
from nbdmirror.web.metrics import METRICS

DOCS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
RULES = 47
"""How many docs/rules.md has."""


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def sections(text: str, heading: str) -> dict[str, str]:
    """Words in backticks of headings like `heading` -> the text up to the next heading of this
    level or above."""
    found: dict[str, str] = {}
    level = len(heading)
    parts = re.split(rf"^(#{{1,{level}}} .*)$", text, flags=re.MULTILINE)
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        if title.startswith(f"{heading} "):
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", title), body)
    return found


def test_links_lead_somewhere() -> None:
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


# The lines of Markdown, so that a difference between two versions can be read


SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)[.!?][)*\"']* +[*(\"'\[]*[A-Z`]")
"""Where one ends and another begins."""


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines that are neither code, tables, headings nor quotations."""
    is_code = False
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code and not line.startswith(("|", "    ", ">", "#")):
            yield number, line


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in DOCS])
def test_lines_of_prose_are_short_and_begin_with_a_sentence(path: Path) -> None:
    """What cannot be broken, a link or code, may be longer."""
    for number, line in prose_of(path):
        words = re.sub(r"`[^`]*`", lambda code: "x" * len(code[0]), line)
        words = re.sub(r"\[[^]]*\]\([^)]*\)", lambda link: "x" * len(link[0]), words)
        assert len(line) < 100 or len(words.split()) < 2, f"{path.name}:{number}: {len(line)}"
        text = re.sub(r"^ *(-|\d+\.) ", "", line)
        assert not SENTENCE.search(re.sub(r"`[^`]*`", "`", text)), f"{path.name}:{number}: {line}"


def test_what_operators_read_first_is_short() -> None:
    """Else it is a notebook again, which docs/measurements/ is for."""
    assert len((ROOT / "docs" / "performance.md").read_text().splitlines()) <= 150


# The files of a state directory


def key_of(steps: Steps) -> str:
    return re.sub(r"\[0\]", "[]", path_of(steps))


@pytest.mark.parametrize("file", FILES)
def test_every_key_of_a_state_directory_is_listed(file: str) -> None:
    """With its type, and whether it is optional."""
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|[^|]*\|[^|]*\| (\w+) \|", tables()[file], re.M)
    members = {key_of(steps): one for name, steps, one in PLACES if name == file}
    expected = {
        key: (one.key.kind.expected, "yes" if one.is_optional else "no")
        for key, one in members.items()
    }
    assert {key: (kind, optional) for key, kind, optional in rows} == expected


def test_keys_that_are_as_old_as_the_format_are_called_so() -> None:
    """Those that a server of the first version has written, and no others."""
    for file in ("NAME.json", "NAME.pivoted"):
        rows = re.findall(r"^\| `([^`]+)` \|[^|]*\|[^|]*\| (\S+) \|", tables()[file], re.M)
        assert {key for key, since in rows if since == "first"} == oldest_keys(file)


def tables() -> dict[str, str]:
    parts = re.split(r"^### (NAME\.\w+)$", text_of("state.md"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def oldest_keys(file: str) -> set[str]:
    name = file.replace("NAME", "vda")
    found = [Golden(case) for case in CASES]
    return {key for one in found if name in one.files for key in keys_in(one.said(name))}


def keys_in(said: Any, path: str = "") -> Iterator[str]:
    if isinstance(said, list):
        for one in said:
            yield from keys_in(one, f"{path}[]")
    elif isinstance(said, dict):
        for key, value in said.items():
            here = f"{path}.{key}" if path else key
            yield here
            yield from keys_in(value, here)


# QMP


def words_of(type_: Any, *, values: bool = True) -> Iterator[str]:
    """Names of members, and values of enums and unions, all the way down."""
    if isinstance(type_, Struct):
        for name, member in type_.members.items():
            yield name
            yield from words_of(member.type, values=values)
        for name, branch in type_.branches.items():
            yield from [name] if values else []
            yield from words_of(branch, values=values)
    elif isinstance(type_, Enum) and values:
        yield from type_.values
    elif isinstance(type_, Array):
        yield from words_of(type_.of, values=values)
    elif isinstance(type_, StringOr):
        yield from words_of(type_.other, values=values)


def test_every_qmp_command_has_its_section() -> None:
    assert set(sections(text_of("qmp.md"), "###")) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_qmp_argument_is_described(command: str) -> None:
    text = sections(text_of("qmp.md"), "###")[command]
    shown = " ".join(text.split())
    if arguments := signature(command):
        assert f"{command} {arguments}" in shown
    else:
        assert f"    {command} " not in text
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)  # described beside that
    words = set(re.findall(r"[a-z0-9][a-z0-9-]*", text))
    if command == "transaction":  # the actions' arguments are the commands'
        wanted = {"actions", "properties", *COMMANDS["transaction"].arguments.members}
        actions = COMMANDS["transaction"].arguments.members["actions"].type
        assert isinstance(actions, Array) and isinstance(actions.of, Struct)
        wanted |= set(actions.of.branches)
    else:
        wanted = set(words_of(COMMANDS[command].arguments))
    assert wanted <= words, f"{command}: {sorted(wanted - words)}"


ONLY_NAMED = {"query-block", "query-named-block-nodes", "query-qmp-schema"}
"""What these return is QEMU's, and large: its type is named."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_qmp_command_has_the_same_parts(command: str) -> None:
    """An example, what is returned, with all members, and errors."""
    text = sections(text_of("qmp.md"), "###")[command]
    assert command in [request["execute"] for request, _ in conversation(text)]
    parts = re.findall(r"^- (Arguments|Returns|Errors|Events)\b", text, flags=re.MULTILINE)
    assert {"Returns", "Errors"} <= set(parts)
    assert len(parts) == len(set(parts))
    for other in re.findall(r"all that `([a-z-]+)` has", text):
        text += sections(text_of("qmp.md"), "###")[other]
    words = set(re.findall(r"[a-z0-9][a-z0-9-]*", re.sub(r"^    .*$", "", text, flags=re.M)))
    if command not in ONLY_NAMED:
        missing = set(words_of(COMMANDS[command].returns, values=False)) - words
        assert not missing, f"{command}: {sorted(missing)}"


def conversation(text: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The requests of a text and the answers, which may leave things out ("...")."""
    block = r"^    %s (.*(?:\n        .*)*)"
    pairs = re.findall(block % "->" + "\n" + block % "<-", text, flags=re.MULTILINE)
    for request, answer in pairs:
        yield json.loads(request), answer


def test_the_examples_of_qmp_are_right() -> None:
    """Arguments, and results that leave nothing out."""
    found = list(conversation(text_of("qmp.md")))
    assert len(found) > len(COMMANDS)
    for request, answer in found:
        if request["execute"] == "qmp_capabilities":
            continue
        command = COMMANDS[request["execute"]]
        command.arguments.check(request.get("arguments", {}))
        if "..." not in answer:
            command.returns.check(json.loads(answer)["return"], command.name)


def test_every_event_is_described() -> None:
    source = "".join(path.read_text() for path in (ROOT / "nbdmirror").rglob("*.py"))
    pattern = r'"((?:BLOCK_JOB|JOB|X_NBDMIRROR)_[A-Z_]+)"'
    rows = re.findall(r"^\| `([A-Z_]+)` \|", text_of("qmp.md"), flags=re.MULTILINE)
    assert sorted(set(re.findall(pattern, source))) == sorted(rows) == sorted(EVENTS)


# The command line


def subparsers() -> dict[str, argparse.ArgumentParser]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no commands")


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_every_command_has_its_section() -> None:
    found = sections(text_of("cli.md"), "##")
    assert set(found) == {f"nbdmirror {name}" for name in subparsers()}


@pytest.mark.parametrize("command", subparsers())
def test_every_option_is_described_and_no_other(command: str) -> None:
    parser = subparsers()[command]
    text = sections(text_of("cli.md"), "##")[f"nbdmirror {command}"]
    there = options_of(parser) - {"-h", "--help"}
    first_cells = re.findall(r"^\| (`--.*?) \|", text, flags=re.MULTILINE)
    listed = " ".join(first_cells + re.findall(r"^Options: (.*)$", text, flags=re.MULTILINE))
    assert set(re.findall(r"`(--[a-z-]+)", listed)) == there
    for action in parser._actions:
        for choice in action.choices or ():
            assert f"`{choice}`" in text, f"{action.option_strings}: {choice}"


def test_commands_that_the_docs_show_can_be_parsed() -> None:
    parsers = subparsers()
    for path in DOCS:
        for command, rest in re.findall(r"\bnbdmirror ([a-z-]+)\b([^`\n]*)", path.read_text()):
            if command in parsers:
                told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest.split(" -- ")[0]))
                assert told <= options_of(parsers[command]), f"{path.name}: {command}{rest}"


# Metrics


def test_every_metric_is_described() -> None:
    """With its type and labels, in the words that Prometheus shows."""
    rows = re.findall(
        r"^\| `(nbdmirror_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", text_of("monitoring.md"), re.M
    )
    told = {name: (kind, re.findall(r"`(\w+)`", labels), text) for name, kind, labels, text in rows}
    assert len(told) == len(rows)
    there = {
        metric.name: (metric.kind, list(metric.labels(level)), metric.help.removesuffix("."))
        for level, metrics in METRICS.items()
        for metric in metrics
    }
    assert told == there
    used = set(re.findall(r"\bnbdmirror_\w+", text_of("monitoring.md")))
    histograms = {name for name, (kind, *_) in there.items() if kind == "histogram"}
    used -= {f"{name}_{part}" for name in histograms for part in ("bucket", "count", "sum")}
    assert used <= set(there)


# The plugin


def test_the_plugins_parameters_are_described() -> None:
    with pytest.raises(ConfigError, match="expected") as refusal:
        PluginProcess().configure("no-such-parameter", "x")
    expected = re.split(r", | or ", str(refusal.value).partition("expected ")[2])
    assert len(expected) > 3
    rows = re.findall(r"^\| `([a-z-]+)=.*?` \|", text_of("plugin.md"), flags=re.MULTILINE)
    assert sorted(rows) == sorted(expected)


# Design and guarantees


def test_every_module_has_its_place_in_the_design() -> None:
    text = text_of("design.md").partition("## Packages")[2].partition("\n## ")[0]
    told = {
        (package, word)
        for package, row in re.findall(r"^\| `(\S*?)` \| (.*) \|$", text, flags=re.MULTILINE)
        for word in re.findall(r"`(\w+)`", row.partition(" | ")[2])
    }
    package = ROOT / "nbdmirror"
    there = {
        (f"{path.parent.relative_to(package)}/".removeprefix("./"), path.stem)
        for path in package.rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    }
    assert told == there


@in_one_worker
def test_every_test_that_is_named_is_there() -> None:
    named = [
        one for path in DOCS for one in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", path.read_text())
    ]
    assert named
    for file, test in named:
        kinds = ast.FunctionDef | ast.ClassDef
        there = {node.name for node in tree_of(ROOT / file).body if isinstance(node, kinds)}
        assert test in there, f"{file}::{test}"


@in_one_worker
def test_every_rule_has_its_tests() -> None:
    """Functions, and mutants that are in the list of those which must be caught, have its mark."""
    numbers = re.findall(r"^(\d+)\. ", text_of("rules.md"), flags=re.MULTILINE)
    assert [int(number) for number in numbers] == list(range(1, RULES + 1))
    assert set(shown()["rule"]) == set(range(1, RULES + 1))


@in_one_worker
def test_every_guarantee_has_its_tests() -> None:
    page = text_of("guarantees.md").partition("\n## What is not promised")[0]
    bold = re.findall(r"^- \*\*(.+?)\*\*", page, flags=re.MULTILINE | re.DOTALL)
    names = [re.sub(r"[.,:]+$", "", " ".join(name.replace("`", "").split())) for name in bold]
    assert len(set(names)) == len(names)
    assert set(shown()["guarantee"]) == set(names)


@in_one_worker
def test_what_has_a_mark_is_run() -> None:
    for tests_of in shown().values():
        for tests in tests_of.values():
            for file, name in (test.split("::") for test in tests):
                assert name in names_in(file), f"{file}::{name}"


@functools.cache
def names_in(file: str) -> set[str]:
    """Names of a file's test functions, and of its mutants."""
    found: set[str] = set()
    for node in tree_of(ROOT / file).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found.add(node.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MUTANTS":
            found |= {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
    return found


# The tour


@pytest.mark.slow
def test_the_tour_of_the_readme(folder: Path) -> None:
    with ran(script_of(ROOT / "README.md"), folder) as text:
        served = re.findall(r"^disk0 .*  (\S+)$", text, flags=re.MULTILINE)
        uri = f"nbd+unix:///?socket={folder}/target.sock"
        assert served == [f"{folder}/disk.img", uri]
        assert "the pivot held the guest for" in text
    assert_identical(folder / "disk.img", folder / "target.img")
