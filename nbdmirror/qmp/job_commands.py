"""QMP's commands for jobs: job-... and, as QEMU had them before, block-job-...

Both find a job by its ID. They differ in the error for a missing job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from nbdmirror.errors import CommandError, DeviceNotActive
from nbdmirror.events import Reply
from nbdmirror.mirror.group import GroupMember
from nbdmirror.mirror.job import Job
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.points_job import PointsJob
from nbdmirror.qmp.command import Action, CommandTable, ask_loop
from nbdmirror.qmp.schema import BOOL, INT, STR, optional, struct
from nbdmirror.server.bitmaps import Change
from nbdmirror.server.server import Server

COMMANDS = CommandTable()

_ID = struct("Job", id=STR)
_DEVICE = struct("BlockJob", device=STR)


def find_job(server: Server, id: str) -> PointsJob:
    """The job with this ID. Raises CommandError as job-... commands do."""
    if (job := server.mirrors.jobs.get(id)) is None:
        raise CommandError("Job not found")
    return job


def find_block_job(server: Server, id: str) -> PointsJob:
    """The job with this ID. Raises DeviceNotActive, as block-job-... commands do."""
    if (job := server.mirrors.jobs.get(id)) is None:
        raise DeviceNotActive(f"Block job '{id}' not found")
    return job


# Pause, speed.


@COMMANDS.command("job-pause", _ID)
def job_pause(server: Server, id: str) -> None:
    find_job(server, id).pause()


@COMMANDS.command("block-job-pause", _DEVICE, is_deprecated=True)
def block_job_pause(server: Server, device: str) -> None:
    find_block_job(server, device).pause()


@COMMANDS.command("job-resume", _ID)
def job_resume(server: Server, id: str) -> None:
    find_job(server, id).resume()


@COMMANDS.command("block-job-resume", _DEVICE, is_deprecated=True)
def block_job_resume(server: Server, device: str) -> None:
    find_block_job(server, device).resume()


@COMMANDS.command("block-job-set-speed", struct("BlockJobSetSpeed", device=STR, speed=INT))
def block_job_set_speed(server: Server, device: str, speed: int) -> None:
    find_block_job(server, device).set_speed(speed)


# Complete. A transaction accepts all or none; the jobs then end each in its own time.


def _completed(job: MirrorJob) -> Change:
    job.check_complete()
    if isinstance(job, PointsJob):
        job.check_applier()
    return Change(_nothing, job.complete)


@COMMANDS.action("job-complete", _ID)
def job_complete(server: Server, id: str) -> Change:
    return _completed(find_job(server, id))


@COMMANDS.action("block-job-complete", _DEVICE, is_deprecated=True)
def block_job_complete(server: Server, device: str) -> Change:
    return _completed(find_block_job(server, device))


# Cancel and finalize.


@COMMANDS.command("job-cancel", _ID)
async def job_cancel(server: Server, id: str) -> Reply:
    """By force, as in QEMU."""
    return await _end(server, partial(find_job, server, id), lambda job: job.cancel(force=True))


def _cancelled(server: Server, device: str, force: bool = False) -> Change:
    """The change of a cancel in a transaction."""
    job = find_block_job(server, device)
    job.check_cancel(force=force)
    return Change(_nothing, partial(job.cancel, force=force))


_CANCEL = struct("BlockJobCancel", device=STR, force=optional(BOOL))


@COMMANDS.command("block-job-cancel", _CANCEL, action=Action(_cancelled))
async def block_job_cancel(server: Server, device: str, force: bool = False) -> Reply:
    find = partial(find_block_job, server, device)
    return await _end(server, find, lambda job: job.cancel(force=force))


@COMMANDS.command("job-finalize", _ID)
async def job_finalize(server: Server, id: str) -> Reply:
    return await _end(server, partial(find_job, server, id), Job.finalize)


@COMMANDS.command("block-job-finalize", _ID, is_deprecated=True)
async def block_job_finalize(server: Server, id: str) -> Reply:
    return await _end(server, partial(find_block_job, server, id), Job.finalize)


async def _end(
    server: Server, find: Callable[[], MirrorJob], end: Callable[[MirrorJob], None]
) -> Reply:
    """End a job. If it waits for its group or for finalize, the last events of the whole group come
    before the reply, as in QEMU."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    left: set[GroupMember] = set()

    def one_ended(job: GroupMember) -> None:
        left.discard(job)
        if not left:
            loop.call_soon_threadsafe(ended.set_result, None)

    def start() -> int | None:
        """The number of the event after the reply; None if it is known only at the jobs' end."""
        job = find()
        if job.has_done_its_work:
            left.update(job.group.jobs)
        ending = list(left)
        end(job)
        for one in ending:
            one.when_ended(partial(one_ended, one))
        return None if ending else server.events.next_number

    next_event: Any = await ask_loop(server, start)
    if next_event is None:
        await ended
        next_event = server.events.next_number
    return Reply({}, next_event)


# Dismiss.


@COMMANDS.command("job-dismiss", _ID)
def job_dismiss(server: Server, id: str) -> None:
    find_job(server, id).dismiss()


@COMMANDS.command("block-job-dismiss", _ID, is_deprecated=True)
def block_job_dismiss(server: Server, id: str) -> None:
    find_block_job(server, id).dismiss()


def _nothing() -> None:
    pass
