"""QMP's commands for points: x-nbdmirror-point, x-nbdmirror-point-ack."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from nbdmirror.errors import CommandError, ConfigError, Error
from nbdmirror.events import Reply
from nbdmirror.mirror.point_request import CommittedPoint, PointRequest
from nbdmirror.mirror.snapshots_job import SnapshotsJob
from nbdmirror.names import check_point_name
from nbdmirror.qmp.command import CommandTable, ask_loop
from nbdmirror.qmp.job_commands import find_job
from nbdmirror.qmp.results import POINT_ACKNOWLEDGED, POINT_TAKEN
from nbdmirror.qmp.schema import BOOL, INT, STR, optional, struct
from nbdmirror.server.server import Server

COMMANDS = CommandTable()

REASON_LENGTH_MAX = 1000
"""Of a refusal, in characters: the reason is in an event and in the log."""


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
    if point.group:
        found["group"] = point.group
    return Reply(found, server.events.next_number)


def _ask(server: Server, id: str, name: str | None) -> PointRequest:
    job = find_job(server, id)
    if job.plan is None:
        mode = job.options.copy_mode
        raise CommandError(f"Job '{id}' makes no points: its copy mode is '{mode}'")
    if name is not None:
        try:
            check_point_name(name)
        except ConfigError as error:
            raise CommandError(f"Parameter 'name': {error}") from error
    return job.ask_for_point(name or "")


@COMMANDS.command(
    "x-nbdmirror-point-ack",
    struct("AcknowledgePoint", id=STR, sequence=INT, error=optional(STR)),
    returns=POINT_ACKNOWLEDGED,
)
def acknowledge_point(
    server: Server, id: str, sequence: int, error: str | None = None
) -> dict[str, Any]:
    job = find_job(server, id)
    if not isinstance(job, SnapshotsJob):
        text = "its points are in a journal"
        if job.plan is None:
            text = f"its copy mode is '{job.options.copy_mode}'"
        raise CommandError(f"Job '{id}' awaits no acknowledgements: {text}")
    if error is not None and len(error) > REASON_LENGTH_MAX:
        raise CommandError(f"Parameter 'error' has more than {REASON_LENGTH_MAX} characters")
    return {"repeated": job.acknowledge(sequence, error)}
