"""All QMP commands, and `dispatch`, which carries one out.

The commands about QMP and the server itself are here.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from typing import Any

from nbdmirror import __version__
from nbdmirror.errors import CommandNotFound
from nbdmirror.events import Reply
from nbdmirror.qmp import (
    bitmap_commands,
    change_commands,
    introspection,
    job_commands,
    mirror_commands,
    node_commands,
    point_commands,
    queries,
    status_query,
    transaction,
)
from nbdmirror.qmp.command import Arguments, CommandTable
from nbdmirror.qmp.opening import in_thread
from nbdmirror.qmp.schema import BOOL, INT, STR, Array, Enum, struct
from nbdmirror.server.server import Server

COMMANDS = CommandTable()
for _table in (
    node_commands.COMMANDS,
    mirror_commands.COMMANDS,
    job_commands.COMMANDS,
    change_commands.COMMANDS,
    bitmap_commands.COMMANDS,
    point_commands.COMMANDS,
    transaction.COMMANDS,
    queries.COMMANDS,
    status_query.COMMANDS,
):
    COMMANDS.update(_table)


async def dispatch(server: Server, name: str, arguments: Arguments) -> Reply:
    """Check and carry out one command. Raises CommandError; then nothing has changed. On the QMP
    server's thread, or in another asyncio loop."""
    if name not in COMMANDS:
        raise CommandNotFound(f"The command {name} has not been found")
    return await COMMANDS[name].run(server, arguments)


@COMMANDS.command("query-commands", returns=Array(struct("CommandInfo", name=STR)))
def query_commands(server: Server) -> list[dict[str, str]]:
    return [{"name": name} for name in (introspection.NEGOTIATION, *COMMANDS)]


@COMMANDS.command("query-qmp-schema", returns=Array(introspection.SCHEMA_INFO))
def query_qmp_schema(server: Server) -> list[introspection.Entry]:
    return _schema()


@functools.cache
def _schema() -> list[introspection.Entry]:
    return introspection.entries(COMMANDS)


_STATUS = struct("StatusInfo", running=BOOL, singlestep=BOOL, status=Enum("RunState", ("running",)))


@COMMANDS.command("query-status", returns=_STATUS)
def query_status(server: Server) -> dict[str, Any]:
    return {"status": "running", "running": True, "singlestep": False}


_VERSION = struct(
    "VersionInfo",
    qemu=struct("VersionTriple", major=INT, minor=INT, micro=INT),
    package=STR,
)


def version_info() -> dict[str, Any]:
    """The version of QEMU whose commands and texts are followed, and nbdmirror's version."""
    major, minor, micro = (int(part) for part in __version__.split("."))
    return {
        "qemu": {"major": 11, "minor": 1, "micro": 0},
        "package": f"nbdmirror {major}.{minor}.{micro}",
    }


@COMMANDS.command("query-version", returns=_VERSION)
def query_version(server: Server) -> dict[str, Any]:
    return version_info()


@COMMANDS.command("quit")
async def quit_(server: Server) -> Reply:
    """Send the jobs' last events, then the answer, then end as with SIGTERM."""
    await in_thread(server.end_jobs)
    asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
    return Reply({}, server.events.next_number)
