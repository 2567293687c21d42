"""`nbdmirror explain`: what jobs wait for, and whether they will end."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from nbdmirror.cli.common import DONE
from nbdmirror.cli.jobs import find_job
from nbdmirror.cli.progress import Meter
from nbdmirror.cli.session import Job, Session
from nbdmirror.cli.status import result_text
from nbdmirror.cli.words import disk_troubles, explanation, server_troubles, shares


async def run(session: Session, args: argparse.Namespace) -> int:
    """All jobs of the server, or the one that is named."""
    chosen = await find_job(session, args) if args.device or args.job else None
    status = await session.status()
    jobs = [
        (disk, job)
        for disk in status.get("disks", [])
        for job in disk.get("jobs") or []
        if chosen in (None, job.get("device"))
    ]
    if args.json:
        print(json.dumps([_as_json(*one) for one in jobs], indent=2))
        return DONE
    lines = [line for disk, job in jobs for line in _text(disk, job)]
    if chosen is None:
        idle = [disk for disk in status.get("disks", []) if not disk.get("jobs")]
        lines += [*map(_without_a_job, idle), *server_troubles(status)]
    print("\n".join(lines) or "no disks")
    return DONE


def _text(disk: dict[str, Any], job: Job) -> list[str]:
    progress = Meter(time.monotonic).update(job)
    head = f"job {job.get('device')}: {progress.state}, {progress.percent:.1f}%"
    lines = [f"{head}, disk {disk.get('name')} to {job.get('target')}"]
    lines += [f"  {text}" for text in [*disk_troubles(disk), *explanation(job)]]
    lines += [f"  {period}: {text}" for period, text in shares(job).items()]
    return lines


def _as_json(disk: dict[str, Any], job: Job) -> dict[str, Any]:
    found = {"disk": disk.get("name"), "job": job.get("device"), "status": job.get("status")}
    return {**found, "explanation": explanation(job), "waits": job.get("waits")}


def _without_a_job(disk: dict[str, Any]) -> str:
    last = disk.get("last-job")
    parts = [f"disk {disk.get('name')} has no job", *disk_troubles(disk)]
    parts += [f"the last job {result_text(last)}"] if last else []
    return "; ".join(parts)
