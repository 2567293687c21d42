"""The table of QMP commands: names and arguments as in QEMU's QAPI schema, and what each does to
jobs.

`Commands.dispatch` is for the QMP door's thread; the work happens on the loop's, one command after
the other.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from nbdmirror import __version__, queries
from nbdmirror.bitmap import check_granularity
from nbdmirror.copier import BUFFER_BYTES_DEFAULT
from nbdmirror.errors import CommandError, CommandNotFound, ConfigError, DeviceNotActive
from nbdmirror.events import Reply
from nbdmirror.job import MirrorJob
from nbdmirror.options import MirrorOptions, Policy
from nbdmirror.qmpschema import COMMANDS
from nbdmirror.remote import CONNECT_TIMEOUT_S, RemoteDevice
from nbdmirror.server import Node, Server, TargetRules
from nbdmirror.uri import nbd_uri

Arguments = dict[str, Any]
Result = TypeVar("Result")

_JOB_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
NODE_NAME_LENGTH_MAX = 31


def version_info() -> dict[str, Any]:
    """query-version: the QEMU whose commands and texts are followed, and what this really is."""
    major, minor, micro = (int(part) for part in __version__.split("."))
    return {
        "qemu": {"major": 7, "minor": 2, "micro": 0},
        "package": f"nbdmirror {major}.{minor}.{micro}",
    }


class Commands:
    """Carries commands out on `server`. `quit` ends the process as SIGTERM does, unless told
    otherwise."""

    def __init__(self, server: Server, quit_: Callable[[], None] | None = None) -> None:
        self._server = server
        self._quit = quit_ or (lambda: os.kill(os.getpid(), signal.SIGTERM))
        self._slow: dict[str, Callable[[Arguments], Awaitable[Reply]]] = {
            "blockdev-add": self._blockdev_add,
            "drive-mirror": self._drive_mirror,
            "blockdev-mirror": self._blockdev_mirror,
            "block-job-finalize": partial(self._finalize, "block-job-finalize"),
            "job-finalize": partial(self._finalize, "job-finalize"),
            "quit": self._quit_in_order,
        }

    async def dispatch(self, name: str, arguments: Arguments) -> Reply:
        """Check and carry out one command. Raises CommandError; then nothing was changed."""
        if name not in COMMANDS:
            raise CommandNotFound(f"The command {name} has not been found")
        COMMANDS[name].check(arguments)
        if name in self._slow:
            return await self._slow[name](arguments)
        return await self._on_loop(lambda: self._run(name, arguments))

    async def _on_loop(self, call: Callable[[], Any]) -> Reply:
        def step() -> Reply:
            value = call()
            return Reply({} if value is None else value, self._server.events.next_number)

        return await asyncio.wrap_future(self._server.loop.run(step))

    def _run(self, name: str, arguments: Arguments) -> Any:
        if name in _JOB_VERBS:
            job = self._job(name, arguments)
            return _JOB_VERBS[name](job, arguments)
        return _QUERIES[name](self._server, arguments)

    def _job(self, name: str, arguments: Arguments) -> MirrorJob:
        """The job that the command names; block-job-... and job-... answer differently when there
        is none."""
        job_id = arguments.get("device", arguments.get("id"))
        job = self._server.jobs.get(str(job_id))
        if job is None:
            if name.startswith("block-job-"):
                raise DeviceNotActive(f"Block job '{job_id}' not found")
            raise CommandError("Job not found")
        return job

    # Targets.

    async def _blockdev_add(self, arguments: Arguments) -> Reply:
        name = arguments.get("node-name")
        if name is None:
            raise CommandError("'node-name' must be specified for the root node")
        if not _NODE_NAME.fullmatch(name):
            raise CommandError(f"Invalid node-name: '{name}'")
        if len(name) > NODE_NAME_LENGTH_MAX:
            raise CommandError("Node name too long")
        await self._on_loop(lambda: self._server.check_node_name(name))
        timeout_s = arguments.get("open-timeout") or CONNECT_TIMEOUT_S
        device = await _open(nbd_uri(arguments), timeout_s)
        return await self._added(Node(name, device))

    async def _added(self, node: Node) -> Reply:
        try:
            return await self._on_loop(lambda: self._server.add_node(node))
        except CommandError:
            node.device.close()
            raise

    # Mirrors.

    async def _blockdev_mirror(self, arguments: Arguments) -> Reply:
        def look() -> Node:
            disk = self._server.find_disk(arguments["device"])
            node = self._server.find_node(arguments["target"])
            if node.disk is disk:
                raise CommandError("Can't mirror node into itself")
            return node

        node: Node = (await self._on_loop(look)).value
        if node.device.is_lost and node.job is None:
            # It was the source before a pivot, or a job before this one lost it.
            node.device = await _open(node.device.uri, CONNECT_TIMEOUT_S)
        return await self._on_loop(lambda: self._start(arguments, node))

    async def _drive_mirror(self, arguments: Arguments) -> Reply:
        if arguments.get("mode", "absolute-paths") != "existing":
            raise CommandError("drive-mirror needs mode 'existing': the target is an NBD export")
        await self._on_loop(lambda: self._server.find_disk(arguments["device"]))
        device = await _open(arguments["target"], CONNECT_TIMEOUT_S)
        node = Node(arguments.get("node-name", ""), device, is_owned=True)

        def start() -> None:
            if not node.name:
                numbers = (f"#block{n:03}" for n in range(len(self._server.nodes) + 1))
                node.name = next(n for n in numbers if n not in self._server.nodes)
            self._server.add_node(node)
            try:
                self._start(arguments, node)
            except CommandError:
                del self._server.nodes[node.name]
                raise

        try:
            return await self._on_loop(start)
        except CommandError:
            device.close()
            raise

    def _start(self, arguments: Arguments, node: Node) -> None:
        disk = self._server.find_disk(arguments["device"])
        options = _options(arguments, disk.name)
        rules = TargetRules(allow_larger=arguments.get("x-nbdmirror-allow-larger-target", False))
        self._server.start_mirror(disk, node, options, rules)

    async def _finalize(self, name: str, arguments: Arguments) -> Reply:
        """Its events come before its return, as in QEMU."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def tell() -> None:
            loop.call_soon_threadsafe(ended.set_result, None)

        def start() -> None:
            job = self._job(name, arguments)
            job.finalize()
            job.when_ended(tell)

        await self._on_loop(start)
        await ended
        return Reply({}, self._server.events.next_number)

    # The rest.

    async def _quit_in_order(self, arguments: Arguments) -> Reply:
        """The jobs' last events, then the answer, then the end."""
        await asyncio.to_thread(self._server.end_jobs)
        asyncio.get_running_loop().call_soon(self._quit)
        return Reply({}, self._server.events.next_number)


def _verb(call: Callable[[MirrorJob], None]) -> Callable[[MirrorJob, Arguments], None]:
    return lambda job, arguments: call(job)


_JOB_VERBS: dict[str, Callable[[MirrorJob, Arguments], None]] = {
    "block-job-complete": _verb(MirrorJob.complete),
    "block-job-pause": _verb(MirrorJob.pause),
    "block-job-resume": _verb(MirrorJob.resume),
    "block-job-dismiss": _verb(MirrorJob.dismiss),
    "block-job-cancel": lambda job, a: job.cancel(force=a.get("force", False)),
    "block-job-set-speed": lambda job, a: job.set_speed(a["speed"]),
    "job-complete": _verb(MirrorJob.complete),
    "job-pause": _verb(MirrorJob.pause),
    "job-resume": _verb(MirrorJob.resume),
    "job-dismiss": _verb(MirrorJob.dismiss),
    "job-cancel": lambda job, a: job.cancel(force=True),
}

_QUERIES: dict[str, Callable[[Server, Arguments], Any]] = {
    "blockdev-del": lambda server, a: server.remove_node(a["node-name"]).device.close(),
    "query-block": lambda server, a: queries.block(server),
    "query-block-jobs": lambda server, a: queries.block_jobs(server),
    "query-jobs": lambda server, a: queries.jobs(server),
    "query-commands": lambda server, a: [{"name": n} for n in ("qmp_capabilities", *COMMANDS)],
    "query-named-block-nodes": lambda server, a: queries.named_block_nodes(server),
    "query-status": lambda server, a: {"status": "running", "running": True, "singlestep": False},
    "query-version": lambda server, a: version_info(),
    "x-nbdmirror-query-status": lambda server, a: queries.status(server),
}


def _options(arguments: Arguments, disk_name: str) -> MirrorOptions:
    """The job's options from checked arguments; raises CommandError with QEMU's text."""
    granularity = arguments.get("granularity", 0)
    if granularity:
        try:
            check_granularity(granularity)
        except ConfigError as error:
            raise CommandError(str(error)) from error
    job_id = arguments.get("job-id", disk_name)
    if not _JOB_ID.fullmatch(job_id):
        raise CommandError(f"Invalid job ID '{job_id}'")
    if arguments.get("buf-size", 0) < 0:
        raise CommandError("Invalid parameter 'buf-size'")
    if arguments.get("speed", 0) < 0:
        raise CommandError("Parameter 'speed' expects a non-negative value")
    if arguments["sync"] not in ("full", "none"):
        raise CommandError(f"Sync mode '{arguments['sync']}' not supported")
    return MirrorOptions(
        job_id=job_id,
        sync=arguments["sync"],
        granularity=granularity,
        buffer_bytes=arguments.get("buf-size", 0) or BUFFER_BYTES_DEFAULT,
        speed_bytes_per_s=arguments.get("speed", 0),
        on_source_error=Policy(arguments.get("on-source-error", "report")),
        on_target_error=Policy(arguments.get("on-target-error", "report")),
        unmap=arguments.get("unmap", True),
        auto_finalize=arguments.get("auto-finalize", True),
        auto_dismiss=arguments.get("auto-dismiss", True),
    )


async def _open(uri: str, timeout_s: float) -> RemoteDevice:
    """Connect in a thread of its own: a server that does not answer holds nobody up."""
    try:
        return await asyncio.to_thread(RemoteDevice.open, uri, timeout_s=timeout_s)
    except ConfigError as error:
        raise CommandError(str(error)) from error
