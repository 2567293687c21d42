"""`transaction`: all of its actions happen, or none."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from nbdmirror.errors import CommandError
from nbdmirror.events import Reply
from nbdmirror.mirror.group import Group
from nbdmirror.qmp import bitmap_commands, job_commands, mirror_commands
from nbdmirror.qmp.command import Action, Arguments, CommandTable, by_name, carried_out
from nbdmirror.qmp.saving import all_saved
from nbdmirror.qmp.schema import NOTHING, Array, Enum, Struct, named, optional, struct
from nbdmirror.server.bitmaps import Change
from nbdmirror.server.server import Server

ACTIONS_MAX = 1024
"""Most actions of one transaction: several for each of many disks. All run in one step of the event
loop."""


_OWN_ACTIONS = CommandTable()


@_OWN_ACTIONS.action("abort", NOTHING)
def abort(server: Server) -> Change:
    raise CommandError("Transaction aborted using Abort action")


_TABLES = (
    _OWN_ACTIONS,
    bitmap_commands.COMMANDS,
    mirror_commands.COMMANDS,
    job_commands.COMMANDS,
)
_ACTIONS = {
    name: (command.arguments, command.action)
    for table in _TABLES
    for name, command in table.items()
    if command.action is not None
}
_ACTION = Struct(
    "TransactionAction",
    named(type=Enum("TransactionActionKind", tuple(_ACTIONS))),
    tag="type",
    branches={name: struct(name, data=arguments) for name, (arguments, _) in _ACTIONS.items()},
)
_COMPLETION_MODE = Enum("ActionCompletionMode", ("individual", "grouped"))
_TRANSACTION = struct(
    "Transaction",
    actions=Array(_ACTION),
    properties=optional(
        struct("TransactionProperties", completion_mode=optional(_COMPLETION_MODE))
    ),
)

COMMANDS = CommandTable()


class _Step(NamedTuple):
    name: str
    action: Action
    arguments: dict[str, Any]
    """By Python name."""


@COMMANDS.command("transaction", _TRANSACTION)
async def transaction(
    server: Server, actions: list[Arguments], properties: Arguments | None = None
) -> Reply:
    if len(actions) > ACTIONS_MAX:
        raise CommandError(f"Parameter 'actions' expects at most {ACTIONS_MAX} actions")
    mode = (properties or {}).get("completion-mode", "individual")
    steps = [_Step(one["type"], _ACTIONS[one["type"]][1], by_name(one["data"])) for one in actions]
    reply = await carried_out(
        server,
        [(step.action, step.arguments) for step in steps],
        partial(_transact, server, steps, is_grouped=mode == "grouped"),
    )
    with suppress(OSError):
        await all_saved(server)
    return reply


def _transact(
    server: Server, steps: list[_Step], prepared: list[tuple[Any, ...]], *, is_grouped: bool
) -> None:
    """Carry out all actions in order, each with what was `prepared` for it, in one step of the
    event loop. If one action fails, the earlier ones are undone and its error is raised."""
    more = {"group": Group()} if is_grouped else {}
    for step in steps:
        if is_grouped and not step.action.starts_job:  # only jobs can end together
            raise CommandError(
                f"Action '{step.name}' does not support transaction property completion-mode = "
                f"grouped"
            )
    done: list[Change] = []
    try:
        for step, found in zip(steps, prepared, strict=True):
            change = step.action.change(server, *found, **step.arguments, **more)
            done.append(change)
    except CommandError:
        for change in reversed(done):
            change.undo()
        raise
    with server.bitmaps.one_moment():
        for change in done:
            change.commit()
