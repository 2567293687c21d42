"""QMP's command block-job-change: another copy mode, and other promises about the end of a job."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from nbdmirror.errors import CommandError
from nbdmirror.events import Reply
from nbdmirror.mirror.options import CopyMode
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.nbd_uri import is_uri
from nbdmirror.nbdclient.device import NbdDevice
from nbdmirror.qmp.arguments import (
    COPY_MODE,
    JOB_TYPE,
    MAY,
    ON_DEADLINE,
    deadline_at_s,
    max_pause_s,
    on_deadline,
)
from nbdmirror.qmp.command import CommandTable, ask_loop, on_loop
from nbdmirror.qmp.job_commands import find_block_job
from nbdmirror.qmp.journals import journal_node, open_journal
from nbdmirror.qmp.opening import in_thread
from nbdmirror.qmp.points_arguments import (
    MEMBERS_OF_CHANGE,
    PROMISES,
    PointsArguments,
    attribute,
    points_options,
    refuse_promises,
)
from nbdmirror.qmp.saving import mirrors_saved
from nbdmirror.qmp.schema import NUMBER, STR, UINT32, Struct, named, optional, struct
from nbdmirror.server.nodes import Node, NodeOptions
from nbdmirror.server.points_checks import check_new_journal
from nbdmirror.server.server import Server

COMMANDS = CommandTable()

_CHANGE = Struct(
    "BlockJobChangeOptions",
    named(id=STR, type=JOB_TYPE),
    tag="type",
    branches={
        "mirror": struct(
            "BlockJobChangeOptionsMirror",
            copy_mode=COPY_MODE,
            x_nbdmirror_max_pause=optional(UINT32),
            x_nbdmirror_may=optional(MAY),
            x_nbdmirror_deadline=optional(NUMBER),
            x_nbdmirror_on_deadline=optional(ON_DEADLINE),
            **MEMBERS_OF_CHANGE,
        )
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeArguments:
    """None: not given. `type` has only one value, mirror."""

    id: str
    type: str
    copy_mode: str
    x_nbdmirror_max_pause: int | None = None
    x_nbdmirror_may: Sequence[str] | None = None
    x_nbdmirror_deadline: float | None = None
    x_nbdmirror_on_deadline: str | None = None
    x_nbdmirror_journal: str | None = None
    """With copy-mode points: the name of a node, or an NBD URI."""
    x_nbdmirror_interval: float | None = None
    x_nbdmirror_keep: float | None = None
    x_nbdmirror_rpo: float | None = None
    x_nbdmirror_store_bytes: int | None = None
    x_nbdmirror_spill_bytes: int | None = None
    x_nbdmirror_on_journal_full: str | None = None
    on_cbw_error: str | None = None

    @property
    def mode(self) -> CopyMode:
        return CopyMode(self.copy_mode)

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of these arguments that were given, by their names as attributes."""
        found = {name: getattr(self, name) for name in map(attribute, names)}
        return {name: value for name, value in found.items() if value is not None}


@COMMANDS.command("block-job-change", _CHANGE)
async def block_job_change(server: Server, **arguments: Any) -> Reply:
    wanted = ChangeArguments(**arguments)
    if await ask_loop(server, partial(_begins_points, server, wanted)):
        reply = await _make_points(server, wanted)
    else:
        reply = await on_loop(server, partial(_change, server, wanted))
    await mirrors_saved(server)
    return reply


def _begins_points(server: Server, wanted: ChangeArguments) -> bool:
    """Whether the job is to change to points. Raises CommandError."""
    job = find_block_job(server, wanted.id)
    given = [name for name in MEMBERS_OF_CHANGE if wanted.given([name])]
    if wanted.mode is CopyMode.POINTS and job.plan is None:
        if wanted.x_nbdmirror_journal is None:
            raise CommandError("Copy mode 'points' needs 'x-nbdmirror-journal'")
        job.check_settled()
        return True
    if given and wanted.mode is CopyMode.POINTS:
        text = f"makes points already: '{given[0]}' cannot be changed"
        raise CommandError(f"Job '{wanted.id}' {text}")
    if given:
        raise CommandError(f"Parameter '{given[0]}' needs copy-mode 'points'")
    return False


def _change(server: Server, wanted: ChangeArguments) -> None:
    more: dict[str, Any] = {}
    job = find_block_job(server, wanted.id)
    if wanted.mode is CopyMode.POINTS:
        refuse_promises(wanted)
    if wanted.x_nbdmirror_max_pause is not None:
        more["max_pause_s"] = max_pause_s(wanted.x_nbdmirror_max_pause)
    if wanted.x_nbdmirror_may is not None:
        more["may"] = tuple(sorted(set(wanted.x_nbdmirror_may)))
    given, at_s = wanted.x_nbdmirror_on_deadline, job.options.deadline_at_s
    if wanted.x_nbdmirror_deadline is not None:
        at_s = more["deadline_at_s"] = deadline_at_s(wanted.x_nbdmirror_deadline)
    if given is not None or at_s is None:
        more["on_deadline"] = on_deadline(given, at_s)
    job.change(wanted.mode, **more)


async def _make_points(server: Server, wanted: ChangeArguments) -> Reply:
    name = wanted.x_nbdmirror_journal or ""
    added = await _opened(server, wanted.id, name) if is_uri(name) else None
    try:
        journal: Node = added or await ask_loop(server, partial(_journal, server, wanted.id, name))
        await in_thread(partial(check_new_journal, journal.device))
        return await on_loop(server, partial(_begin, server, wanted, added))
    except CommandError:
        if added is not None:
            added.device.close()
        raise


async def _opened(server: Server, job_id: str, uri: str) -> Node:
    """A node that is not added yet."""
    job: PointsJob = await ask_loop(server, partial(find_block_job, server, job_id))
    target = job.target
    assert isinstance(target, NbdDevice)
    device = await open_journal(server, uri, job.disk.name, target.pool.timeout_s)
    options = NodeOptions(reconnect_delay_s=job.options.reconnect_delay_s)
    return Node("", device, options, is_owned=True)


def _journal(server: Server, job_id: str, name: str) -> Node:
    """Raises CommandError unless it may be looked into."""
    return journal_node(server, name, find_block_job(server, job_id).disk.name)


def _begin(server: Server, wanted: ChangeArguments, added: Node | None) -> None:
    job = find_block_job(server, wanted.id)
    job.check_settled()
    if job.plan is not None:  # by another client, meanwhile
        raise CommandError(f"Job '{wanted.id}' makes points already")
    try:
        if added is not None:
            if added.device.read_only:
                raise CommandError(f"Journal '{added.device.uri}' is read-only")
            server.nodes.add(added)
            wanted = replace(wanted, x_nbdmirror_journal=added.name)
        kept: dict[str, Any] = {
            "x_nbdmirror_max_pause": round((job.options.max_pause_s or 0) * 1000),
            "x_nbdmirror_may": job.options.may,
            "x_nbdmirror_deadline": float(job.options.deadline_at_s is not None),
        }
        given = wanted.given([*PROMISES, *MEMBERS_OF_CHANGE])
        arguments = PointsArguments(
            copy_mode=wanted.copy_mode, sync=job.options.sync, **(kept | given)
        )
        points = points_options(server.nodes, job.disk, arguments)
        assert points is not None
        server.mirrors.make_points(job, points)
    except CommandError:
        if added is not None:
            server.nodes.forget(added)
        raise
