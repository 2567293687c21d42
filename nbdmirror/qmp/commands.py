"""The table of QMP commands: names and arguments as in QEMU's QAPI schema, and what each does to
jobs.

`Commands.dispatch` is for the QMP door's thread; the work happens on the loop's, one command after
the other.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from nbdmirror import __version__
from nbdmirror.errors import CommandError, CommandNotFound, ConfigError
from nbdmirror.events import Reply
from nbdmirror.mirror.job import Job
from nbdmirror.mirror.mirror_job import MirrorJob
from nbdmirror.mirror.options import CopyMode
from nbdmirror.nbdclient.device import RemoteDevice
from nbdmirror.nbdclient.pool import CONNECT_TIMEOUT_S
from nbdmirror.qmp import introspection, queries
from nbdmirror.qmp import status_query as statusquery
from nbdmirror.qmp.addresses import nbd_uri, target_uri
from nbdmirror.qmp.arguments import COMMANDS
from nbdmirror.qmp.transaction import BITMAP_ACTIONS, create_mirror, find_job, transact
from nbdmirror.server.nodes import Node, NodeOptions
from nbdmirror.server.server import Server

Arguments = dict[str, Any]

OPEN_TIMEOUT_S_MAX = 3600
"""A command that waits for a handshake keeps its client's place among qmp.CLIENTS_MAX, even if the
client has gone. So no more handshakes are under way than clients are allowed."""


def version_info() -> dict[str, Any]:
    """query-version: the QEMU whose commands and texts are followed, and what this really is."""
    major, minor, micro = (int(part) for part in __version__.split("."))
    return {
        "qemu": {"major": 11, "minor": 1, "micro": 0},
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
            "block-job-cancel": partial(self._end_pending, "block-job-cancel"),
            "block-job-finalize": partial(self._end_pending, "block-job-finalize"),
            "job-cancel": partial(self._end_pending, "job-cancel"),
            "job-finalize": partial(self._end_pending, "job-finalize"),
            "transaction": self._transaction,
            "quit": self._quit_in_order,
        }

    async def dispatch(self, name: str, arguments: Arguments) -> Reply:
        """Check and carry out one command. Raises CommandError; then nothing was changed."""
        if name not in COMMANDS:
            raise CommandNotFound(f"The command {name} has not been found")
        COMMANDS[name].check(arguments)
        if name in self._slow:
            reply = await self._slow[name](arguments)
        else:
            reply = await self._on_loop(lambda: self._run(name, arguments))
        if name in _CHANGES:
            await self._keep(name)
        return reply

    async def _keep(self, name: str) -> None:
        """Answer when what is to outlive the process is on disk. A mirror goes on without that, and
        an event tells; of bitmaps it is promised."""
        is_bitmap = name in BITMAP_ACTIONS or name == "transaction"

        def saves() -> list[Future[None]]:
            lasting = [kept for kept in self._server.kept.values() if kept.is_lasting]
            return [kept.bits_saved() if is_bitmap else kept.saved() for kept in lasting]

        futures: list[Future[None]] = (await self._on_loop(saves)).value
        deadline_s = time.monotonic() + KEPT_S_MAX
        try:
            for future in futures:
                await _ended(asyncio.wrap_future(future), deadline_s)
        except OSError as error:
            if name in BITMAP_ACTIONS:
                text = f"The change is active but could not be saved: {error}"
                raise CommandError(text) from error

    async def _on_loop(self, call: Callable[[], Any]) -> Reply:
        def step() -> Reply:
            value = call()
            return Reply({} if value is None else value, self._server.events.next_number)

        return await asyncio.wrap_future(self._server.loop.run(step))

    def _run(self, name: str, arguments: Arguments) -> Any:
        if name in _JOB_VERBS:
            return _JOB_VERBS[name](find_job(self._server, name, arguments), arguments)
        if name in BITMAP_ACTIONS:
            BITMAP_ACTIONS[name](self._server, arguments).commit()
            return None
        return _QUERIES[name](self._server, arguments)

    # Targets.

    async def _blockdev_add(self, arguments: Arguments) -> Reply:
        name = arguments.get("node-name")
        if name is None:
            raise CommandError("'node-name' must be specified for the root node")
        await self._on_loop(lambda: self._server.nodes.check_name(name))
        await self._on_loop(self._server.nodes.check_room)
        options, file = _node_options(arguments), arguments.get("file")
        is_active = arguments.get("active", True)
        if isinstance(file, str):
            return await self._on_loop(lambda: self._add_on(file, name, options, is_active))
        if file is None:
            node = await _open_node(name, arguments)
        else:
            if "node-name" in file:
                await self._on_loop(lambda: self._server.nodes.check_name(file["node-name"]))
            inherited = {key: arguments[key] for key in _INHERITED if key in arguments}
            below = await _open_node(file.get("node-name", ""), {**inherited, **file})
            below.is_inline = True
            node = Node(name, below.device, options, file=below, is_active=is_active)
        try:
            return await self._on_loop(lambda: self._server.nodes.add(node))
        except CommandError:
            node.device.close()
            raise

    def _add_on(self, file: str, name: str, options: NodeOptions, is_active: bool) -> None:
        below = self._server.nodes.find_file(file)
        node = Node(name, below.device, options, file=below, is_active=is_active)
        self._server.nodes.add(node)

    async def _bring_back(self, arguments: Arguments) -> None:
        """A target that was the source before a pivot, or that a job before lost, is closed."""

        nodes = self._server.nodes

        def look() -> list[Node]:
            node = nodes.find_target(nodes.find_disk(arguments["device"]), arguments["target"])
            return [node] if node is not None and nodes.is_closed(node) else []

        found: list[Node] = (await self._on_loop(look)).value
        for node in found:
            await self._on_loop(partial(nodes.check_left, node.device.uri))
            device = await _open(partial(str, node.device.uri), node.device.pool.timeout_s)
            if not (await self._on_loop(partial(nodes.reopen, node, device))).value:
                device.close()

    # Mirrors.

    async def _blockdev_mirror(self, arguments: Arguments) -> Reply:
        await self._bring_back(arguments)

        def start() -> None:
            self._server.mirrors.begin(create_mirror(self._server, arguments))

        return await self._on_loop(start)

    async def _drive_mirror(self, arguments: Arguments) -> Reply:
        if arguments.get("mode", "absolute-paths") != "existing":
            raise CommandError("drive-mirror needs mode 'existing': the target is an NBD export")
        if (format_ := arguments.get("format", "raw")) not in ("raw", "nbd"):
            raise CommandError(
                f"drive-mirror writes format 'raw' alone: let the target's server make it "
                f"'{format_}', as qemu-nbd does"
            )
        nodes = self._server.nodes
        await self._on_loop(lambda: nodes.find_disk(arguments["device"]))
        if "node-name" in arguments:
            await self._on_loop(lambda: nodes.check_name(arguments["node-name"]))
        elif "replaces" in arguments:
            raise CommandError(
                "a node-name must be provided when replacing a named node of the graph"
            )
        uri = target_uri(arguments["target"])
        await self._on_loop(lambda: nodes.check_left(uri))
        device = await _open(lambda: uri, CONNECT_TIMEOUT_S)
        options = NodeOptions(reconnect_delay_s=arguments.get("x-nbdmirror-reconnect-delay", 0))
        node = Node(arguments.get("node-name", ""), device, options, is_owned=True)

        def start() -> None:
            if device.read_only:
                raise CommandError(f"Target '{uri}' is read-only")
            nodes.add(node)
            try:
                job = create_mirror(self._server, {**arguments, "target": node.name})
            except CommandError:
                nodes.forget(node)
                raise
            self._server.mirrors.begin(job)

        try:
            return await self._on_loop(start)
        except CommandError:
            device.close()
            raise

    async def _end_pending(self, name: str, arguments: Arguments) -> Reply:
        """Finalize and cancel: where they end a pending job, the last events of its whole group
        come before their return, as in QEMU."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        left: set[Job] = set()

        def tell(job: Job) -> None:
            left.discard(job)
            if not left:
                loop.call_soon_threadsafe(ended.set_result, None)

        def start() -> dict[str, Any]:
            job = find_job(self._server, name, arguments)
            if job.has_done_its_work:
                left.update(job.group.jobs)
            ending = list(left)
            if name.endswith("finalize"):
                job.finalize()
            else:
                job.cancel(force=name == "job-cancel" or arguments.get("force", False))
            for one in ending:
                one.when_ended(partial(tell, one))
            return {"waits": bool(ending)}

        reply = await self._on_loop(start)
        if not reply.value["waits"]:
            return Reply({}, reply.next_event)
        await ended
        return Reply({}, self._server.events.next_number)

    async def _transaction(self, arguments: Arguments) -> Reply:
        for action in arguments["actions"]:
            if action["type"] == "blockdev-mirror":
                await self._bring_back(action["data"])
        return await self._on_loop(lambda: transact(self._server, arguments))

    # The rest.

    async def _quit_in_order(self, arguments: Arguments) -> Reply:
        """The jobs' last events, then the answer, then the end."""
        await asyncio.to_thread(self._server.end_jobs)
        asyncio.get_running_loop().call_soon(self._quit)
        return Reply({}, self._server.events.next_number)


async def _ended(kept: asyncio.Future[None], deadline_s: float) -> None:
    """Raises OSError: it cannot be kept, or not by then."""
    kept.add_done_callback(lambda future: future.cancelled() or future.exception())  # is looked at
    await asyncio.wait([kept], timeout=max(0.0, deadline_s - time.monotonic()))
    if not kept.done():
        raise TimeoutError("guests' writes in flight do not end")
    try:
        kept.result()
    except OSError as error:
        raise OSError(f"the state directory cannot be written: {error}") from error


def _verb(call: Callable[[MirrorJob], None]) -> Callable[[MirrorJob, Arguments], None]:
    return lambda job, arguments: call(job)


KEPT_S_MAX = 5.0
"""A client that is to cancel the job whose target hangs, with a guest's write, must be answered."""

_CHANGES = {"drive-mirror", "blockdev-mirror", "transaction", *BITMAP_ACTIONS}
"""Commands that are answered when what they changed is on disk."""

_JOB_VERBS: dict[str, Callable[[MirrorJob, Arguments], None]] = {
    "block-job-complete": _verb(MirrorJob.complete),
    "block-job-pause": _verb(MirrorJob.pause),
    "block-job-resume": _verb(MirrorJob.resume),
    "block-job-dismiss": _verb(MirrorJob.dismiss),
    "block-job-change": lambda job, a: job.change(CopyMode(a["copy-mode"])),
    "block-job-set-speed": lambda job, a: job.set_speed(a["speed"]),
    "job-complete": _verb(MirrorJob.complete),
    "job-pause": _verb(MirrorJob.pause),
    "job-resume": _verb(MirrorJob.resume),
    "job-dismiss": _verb(MirrorJob.dismiss),
}

_QUERIES: dict[str, Callable[[Server, Arguments], Any]] = {
    "blockdev-del": lambda server, a: server.nodes.remove(a["node-name"]),
    "blockdev-set-active": lambda server, a: server.nodes.set_active(
        a.get("node-name"), a["active"]
    ),
    "query-block": lambda server, a: queries.block(server),
    "query-block-exports": lambda server, a: queries.block_exports(server),
    "query-block-jobs": lambda server, a: queries.block_jobs(server),
    "query-jobs": lambda server, a: queries.jobs(server),
    "query-commands": lambda server, a: [{"name": n} for n in ("qmp_capabilities", *COMMANDS)],
    "query-named-block-nodes": lambda server, a: queries.named_block_nodes(server),
    "query-qmp-schema": lambda server, a: introspection.entries(),
    "query-status": lambda server, a: {"status": "running", "running": True, "singlestep": False},
    "query-version": lambda server, a: version_info(),
    "x-nbdmirror-query-status": lambda server, a: statusquery.status(server),
}


_INHERITED = ("read-only", "auto-read-only", "discard", "detect-zeroes", "cache")
"""Options that a node passes on to one that is made with it."""


async def _open_node(name: str, arguments: Arguments) -> Node:
    """One of the driver `nbd`, connected."""
    options = _node_options(arguments)
    timeout_s = arguments.get("open-timeout") or CONNECT_TIMEOUT_S
    if timeout_s > OPEN_TIMEOUT_S_MAX:
        raise CommandError(f"Parameter 'open-timeout' expects at most {OPEN_TIMEOUT_S_MAX}")
    device = await _open(partial(nbd_uri, arguments), timeout_s)
    wants_writes = not (options.read_only or arguments.get("auto-read-only"))
    if device.read_only and wants_writes:
        device.close()
        raise CommandError("Could not open image: Permission denied")
    return Node(name, device, options, is_active=arguments.get("active", True))


def _node_options(arguments: Arguments) -> NodeOptions:
    detect_zeroes, cache = arguments.get("detect-zeroes", "off"), arguments.get("cache", {})
    if detect_zeroes == "unmap" and arguments.get("discard", "ignore") != "unmap":
        raise CommandError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to "
            "unmap"
        )
    return NodeOptions(
        reconnect_delay_s=arguments.get("reconnect-delay", 0),
        read_only=arguments.get("read-only", False),
        detect_zeroes=detect_zeroes,
        direct=cache.get("direct", False),
        no_flush=cache.get("no-flush", False),
    )


async def _open(uri: Callable[[], str], timeout_s: float) -> RemoteDevice:
    """Connect in a thread of its own: a server that does not answer holds nobody up, nor does a
    file system with keys, which `uri` may look at. Not in asyncio's pool, which has six, and whose
    threads the process waits for at its end."""
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[RemoteDevice] = loop.create_future()

    def tell(device: RemoteDevice | None, error: Exception | None) -> None:
        if device is not None and not opened.cancelled():
            opened.set_result(device)
        elif device is not None:
            device.close()
        elif error is not None and not opened.cancelled():
            opened.set_exception(error)

    def work() -> None:
        device, failure = None, None
        try:
            device = RemoteDevice.open(uri(), timeout_s=timeout_s, mirrors=True)
        except Exception as error:  # noqa: BLE001 - the command's, which is waiting for it
            failure = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, device, failure)

    threading.Thread(target=work, name="nbdmirror-open", daemon=True).start()
    try:
        return await opened
    except ConfigError as error:
        raise CommandError(str(error)) from error
