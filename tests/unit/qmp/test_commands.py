"""Each QMP command is one entry, and all that is known about commands comes from the entries.

(That each has its section in docs/qmp.md, with its arguments, is in project/test_docs.py.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest

from nbdmirror.qmp import (
    bitmap_commands,
    change_commands,
    introspection,
    mirror_commands,
    node_commands,
)
from nbdmirror.qmp.command import Command, CommandTable, by_name
from nbdmirror.qmp.commands import COMMANDS, query_commands, query_qmp_schema
from nbdmirror.qmp.schema import INT, NOTHING, STR, Array, Struct, optional, struct

IN_ONE = {
    "blockdev-add": node_commands.NodeArguments,
    "blockdev-mirror": mirror_commands.MirrorArguments,
    "drive-mirror": mirror_commands.MirrorArguments,
    "block-job-change": change_commands.ChangeArguments,
}
"""Commands whose handlers take all further arguments at once, and the class that parses them."""


def shapes(type_: Struct) -> Iterator[tuple[set[str], set[str]]]:
    """Of each branch: the members that must be there, and those that may be."""
    branches = type_.branches.values() or [NOTHING]
    for branch in branches:
        members = {**type_.members, **branch.members}
        optional_ = {name for name, member in members.items() if member.optional}
        yield set(members) - optional_, optional_


def misfits(command: Command, function: Callable[..., Any]) -> list[str]:
    """Arguments that the schema lets pass and `function` does not take, or that it lacks."""
    _, *found = inspect.signature(function).parameters.values()
    if command.name in IN_ONE:
        found += inspect.signature(IN_ONE[command.name]).parameters.values()
    others = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY
    parameters = [parameter for parameter in found if parameter.kind not in others]
    needed = {one.name for one in parameters if one.default is one.empty}
    taken = {one.name for one in parameters}
    misfits = []
    for required, more in shapes(command.arguments):
        always, sometimes = set(by_name(dict.fromkeys(required))), set(by_name(dict.fromkeys(more)))
        misfits += [f"{name} is not taken" for name in sorted((always | sometimes) - taken)]
        misfits += [f"{name} may be missing" for name in sorted(needed - always)]
    return misfits


@pytest.mark.parametrize("name", COMMANDS)
def test_handlers_take_the_arguments_that_the_schema_lets_pass(name: str) -> None:
    command = COMMANDS[name]
    assert command.name == name
    if command.action is None:
        assert misfits(command, command.handler) == []
        return
    functions = [command.action.change, command.action.prepare]
    for function in functions:
        if function is not None:
            assert misfits(command, function) == []


@pytest.mark.parametrize("name", IN_ONE)
def test_no_argument_is_parsed_that_no_command_has(name: str) -> None:
    of_class = {name for name, one in IN_ONE.items() if one is IN_ONE[name]}
    known = {
        member
        for one in of_class
        for required, more in shapes(COMMANDS[one].arguments)
        for member in by_name(dict.fromkeys(required | more))
    }
    assert {one.name for one in fields(IN_ONE[name])} <= known


def test_a_misfit_is_found() -> None:
    table = CommandTable()

    @table.command("x", struct("X", a=STR, b=optional(INT)))
    def handler(server: Any, a: str, c: int) -> None:
        raise NotImplementedError

    assert misfits(table["x"], handler) == ["b is not taken", "c may be missing"]


def test_a_name_is_taken_once() -> None:
    tables = [module.COMMANDS for module in (bitmap_commands, mirror_commands, node_commands)]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
    with pytest.raises(AssertionError, match="exists already"):
        tables[0].command("block-dirty-bitmap-add")(lambda server: None)


def test_a_transaction_takes_what_entries_say() -> None:
    actions = COMMANDS["transaction"].arguments.members["actions"].type
    assert isinstance(actions, Array)
    action = actions.of
    assert isinstance(action, Struct)
    expected = {name: one.arguments for name, one in COMMANDS.items() if one.action is not None}
    taken = {name: branch.members["data"].type for name, branch in action.branches.items()}
    assert taken == {**expected, "abort": NOTHING}


def test_the_schema_has_all_commands_and_their_types() -> None:
    entries = {entry["name"]: entry for entry in query_qmp_schema(None)}  # type: ignore[arg-type]
    listed = [entry["name"] for entry in query_commands(None)]  # type: ignore[arg-type]
    commands = {name for name, entry in entries.items() if entry["meta-type"] == "command"}
    assert sorted(commands) == sorted(listed) == sorted({introspection.NEGOTIATION, *COMMANDS})
    for name, command in COMMANDS.items():
        arguments = entries[entries[name]["arg-type"]]
        assert {member["name"] for member in arguments["members"]} == set(command.arguments.members)
        assert (entries[name].get("features") == ["deprecated"]) is command.is_deprecated
        is_array = entries[entries[name]["ret-type"]]["meta-type"] == "array"
        assert is_array is isinstance(command.returns, Array)
