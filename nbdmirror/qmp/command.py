"""A QMP command is one entry beside its handler: `CommandTable.command` or `CommandTable.action`.

The schema, introspection, dispatch, the actions of a transaction and the test of the documentation
all read the entry.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from nbdmirror.errors import CommandError
from nbdmirror.events import Reply
from nbdmirror.qmp.schema import NOTHING, Struct, Type
from nbdmirror.server.bitmaps import Change
from nbdmirror.server.server import Server

Arguments = dict[str, Any]
Handler = Callable[..., Any]
Wait = Callable[[Server], Awaitable[None]]
Prepare = Callable[..., Awaitable[tuple[Any, ...]]]
_AnyHandler = TypeVar("_AnyHandler", bound=Handler)
_ChangeHandler = TypeVar("_ChangeHandler", bound=Callable[..., Change])


@dataclass(frozen=True, slots=True)
class Action:
    """What a command does in a transaction. Both functions take the server and the command's
    arguments by name."""

    change: Callable[..., Change]
    """Runs in one step of the event loop. Raises CommandError; then nothing has changed. Takes,
    after the server, what `prepare` has returned."""
    prepare: Prepare | None = None
    """Slow work before `change`; awaited on the QMP server's thread. Takes, after the server, a
    stack for what is to be undone if the command fails."""
    starts_job: bool = False
    """The action is allowed in a grouped transaction: `change` takes the job's `group` as well."""


@dataclass(frozen=True, slots=True)
class Command:
    """`handler` takes the server and the arguments by their names, with `_` for `-`. An optional
    argument that was not given is not passed.

    A coroutine runs on the QMP server's thread and returns a Reply. Any other function runs in one
    step on the event loop's thread, and returns the result or None for an empty one. Both raise
    CommandError; then nothing has changed.
    """

    name: str
    arguments: Struct
    returns: Type
    handler: Handler
    action: Action | None = None
    """None: the command is not an action of a transaction."""
    is_deprecated: bool = False
    """Deprecated in QEMU."""

    async def run(self, server: Server, arguments: Arguments) -> Reply:
        """Check the arguments and carry the command out. Raises CommandError."""
        self.arguments.check(arguments)
        call = partial(self.handler, server, **by_name(arguments))
        if not inspect.iscoroutinefunction(self.handler):
            return await on_loop(server, call)
        reply = await call()
        assert isinstance(reply, Reply)
        return reply


class CommandTable(dict[str, Command]):
    """Commands by their names, in the order in which they were added."""

    def command(
        self,
        name: str,
        arguments: Struct = NOTHING,
        *,
        returns: Type = NOTHING,
        action: Action | None = None,
        is_deprecated: bool = False,
    ) -> Callable[[_AnyHandler], _AnyHandler]:
        """Add the command that the decorated function carries out."""

        def add(handler: _AnyHandler) -> _AnyHandler:
            assert name not in self, f"{name} exists already"
            self[name] = Command(name, arguments, returns, handler, action, is_deprecated)
            return handler

        return add

    def action(
        self,
        name: str,
        arguments: Struct,
        *,
        prepare: Prepare | None = None,
        starts_job: bool = False,
        then: Wait | None = None,
        is_deprecated: bool = False,
    ) -> Callable[[_ChangeHandler], _ChangeHandler]:
        """Add the command whose `Action.change` is the decorated function. Alone, the command is a
        transaction of this one action. It is answered when `then` is done."""

        def add(change: _ChangeHandler) -> _ChangeHandler:
            action = Action(change, prepare, starts_job)

            async def run(server: Server, /, **arguments: Any) -> Reply:
                def step(prepared: list[tuple[Any, ...]]) -> None:
                    change(server, *prepared[0], **arguments).commit()

                reply = await carried_out(server, [(action, arguments)], step)
                if then is not None:
                    await then(server)
                return reply

            self.command(name, arguments, action=action, is_deprecated=is_deprecated)(run)
            return change

        return add


async def carried_out(
    server: Server,
    steps: list[tuple[Action, Arguments]],
    change: Callable[[list[tuple[Any, ...]]], None],
) -> Reply:
    """Prepare all `steps`, in order; then call `change` with what each has returned, in one step on
    the event loop's thread. Raises CommandError; then nothing has changed."""
    undo, found = ExitStack(), []
    try:
        for action, arguments in steps:
            prepare = action.prepare
            found.append(() if prepare is None else await prepare(server, undo, **arguments))
        return await on_loop(server, partial(change, found))
    except CommandError:
        undo.close()
        raise


def by_name(arguments: Arguments) -> Arguments:
    """The arguments with Python names: `_` for `-`. The values stay as they are."""
    return {name.replace("-", "_"): value for name, value in arguments.items()}


async def on_loop(server: Server, call: Callable[[], Any]) -> Reply:
    """The result of `call`, in one step on the event loop's thread. Raises the errors of `call`."""

    def step() -> Reply:
        value = call()
        return Reply({} if value is None else value, server.events.next_number)

    return await asyncio.wrap_future(server.loop.run(step))


async def ask_loop(server: Server, call: Callable[[], Any]) -> Any:
    """As `on_loop`, without the number of the next event: for a handler's intermediate steps."""
    return await asyncio.wrap_future(server.loop.run(call))
