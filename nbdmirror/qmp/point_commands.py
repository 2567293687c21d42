"""QMP's command for points: x-nbdmirror-point."""

from __future__ import annotations

import asyncio
from functools import partial

from nbdmirror.errors import CommandError, ConfigError, Error
from nbdmirror.events import Reply
from nbdmirror.mirror.point_request import CommittedPoint, PointRequest
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.names import check_point_name
from nbdmirror.qmp.command import CommandTable, ask_loop
from nbdmirror.qmp.job_commands import find_job
from nbdmirror.qmp.results import POINT_TAKEN
from nbdmirror.qmp.schema import BOOL, STR, optional, struct
from nbdmirror.server.server import Server

COMMANDS = CommandTable()


@COMMANDS.command(
    "x-nbdmirror-point",
    struct("MakePoint", id=STR, name=optional(STR), wait=optional(BOOL)),
    returns=POINT_TAKEN,
)
async def make_point(server: Server, id: str, name: str | None = None, wait: bool = False) -> Reply:
    """Answered when the point's moment is over; with `wait` when the far side has the point."""
    request: PointRequest = await ask_loop(server, partial(_ask, server, id, name))
    future = request.committed if wait else request.taken
    try:
        point: CommittedPoint = await asyncio.wrap_future(future)
    except (Error, OSError) as error:
        raise CommandError(f"Job '{id}' has not made the point: {error}") from error
    found = {"sequence": point.sequence, "time-s": round(point.time_ns / 1e9, 3)}
    return Reply(found, server.events.next_number)


def _ask(server: Server, id: str, name: str | None) -> PointRequest:
    job = find_job(server, id)
    if not isinstance(job, PointsJob):
        mode = job.options.copy_mode
        raise CommandError(f"Job '{id}' makes no points: its copy mode is '{mode}'")
    if name is not None:
        try:
            check_point_name(name)
        except ConfigError as error:
            raise CommandError(f"Parameter 'name': {error}") from error
    return job.ask_for_point(name or "")
