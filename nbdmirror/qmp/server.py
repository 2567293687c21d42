"""QMP as in QEMU: the socket, the JSON stream, the conversation. Commands are in other modules.

`QmpServer.start` starts one daemon thread with an asyncio loop that owns every connection;
`dispatch` is called on it and must not block. `start` and `stop` are for any thread.

Promises: - Input is a stream of JSON values; no newline is needed. Each byte is scanned a bounded
number of times, however the input is cut into packets, and the memory for an unfinished value is
bounded. - The commands of one client run one at a time, in order. A command's events precede its
return, and later events follow it, as in QEMU (`Reply.next_event`). - A client that does not read,
sends garbage or disconnects harms no other client and not the server.

Texts are compared with qemu-storage-daemon. Differences: input that is not JSON is one error, with
nbdmirror's text. Limits are smaller, and a client beyond a limit is disconnected (QEMU continues in
the middle of the value); so is a client with many errors in a row.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from nbdmirror.errors import CommandError, CommandNotFound, Error
from nbdmirror.events import EventRing, Reply
from nbdmirror.qmp.json_stream import JsonStream, ParseError
from nbdmirror.unix_sockets import remove_socket

Dispatch = Callable[[str, dict[str, Any]], Awaitable[Reply]]

_KEEP_FILE: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
"""Since Python 3.13 asyncio would remove the socket's file at the end: the file that was at the
path when asyncio began to listen, which may belong to another server by then. `remove_socket`
removes the right one."""
ERRORS_IN_A_ROW_MAX = 1024
"""After so many inputs in a row that are not JSON objects the connection is closed: each costs a
reply, and the sender is not a QMP client."""
OUTPUT_BYTES_MAX = 4 << 20
"""Most output that waits for a client beyond the kernel's buffer: some 20,000 events. QEMU's client
cannot read a line above 10 MB, and no reply is nearly so long."""
CLIENTS_MAX = 32
"""Enough for an operator, a few tools and a monitor. With the bounds above 32 hostile clients take
350 MiB."""
STOP_S_MAX = 5.0
COMMAND_GRACE_S = 2.0
"""How long `stop` waits for commands in progress, especially `quit`, so that they are answered."""
FLUSH_S_MAX = 0.5
READ_BYTES = 1 << 16

_log = logging.getLogger(__name__)


class _Client:
    """One connection. Used only on the loop's thread."""

    def __init__(self, name: str, writer: asyncio.StreamWriter, events: EventRing) -> None:
        self.name = name
        self.busy = False
        self._writer = writer
        self._events = events
        self._next_event: int | None = None

    @property
    def negotiated(self) -> bool:
        return self._next_event is not None

    def negotiate(self) -> None:
        self._next_event = self._events.next_number

    @property
    def gone(self) -> bool:
        return self._writer.is_closing()

    def send(self, message: dict[str, Any]) -> None:
        self._send_line(_encode(message))

    def reply(self, line: bytes, next_event: int) -> None:
        """Send events before `next_event`, then the reply, then later events."""
        self._send_events(next_event)
        self._send_line(line)
        self.busy = False
        self.send_events()

    def send_events(self) -> None:
        """Send new events. While a command is in progress events wait for its reply, since only the
        reply says which of them come first."""
        if not self.busy:
            self._send_events(self._events.next_number)

    def _send_events(self, until: int) -> None:
        if self._next_event is None or self.gone:
            return
        for event in self._events.pull(self._next_event):
            if event.number >= until:
                return
            if event.number > self._next_event:
                self.drop(f"missed {event.number - self._next_event} events")
                return
            self._next_event = event.number + 1
            micros = round(event.timestamp_s * 1_000_000)
            message: dict[str, Any] = {
                "timestamp": {"seconds": micros // 1_000_000, "microseconds": micros % 1_000_000},
                "event": event.name,
            }
            if event.data:
                message["data"] = event.data
            self._send_line(_encode(message))

    def _send_line(self, line: bytes) -> None:
        if self.gone:
            return
        self._writer.write(line)
        if self._writer.transport.get_write_buffer_size() > OUTPUT_BYTES_MAX:
            self.drop(f"does not read: more than {OUTPUT_BYTES_MAX} bytes wait for it")

    def drop(self, reason: str) -> None:
        _log.warning("qmp: %s disconnected: %s", self.name, reason)
        self._writer.transport.abort()

    async def drain(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def close(self) -> None:
        """Close after all output was sent, or after a bound."""
        self.send_events()
        self._writer.close()
        with contextlib.suppress(OSError):
            try:
                async with asyncio.timeout(FLUSH_S_MAX):
                    await self._writer.wait_closed()
            except TimeoutError:
                self._writer.transport.abort()  # of a transport that is closed it may raise


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, allow_nan=False).encode() + b"\r\n"


def _encode_error(error: Error, request: Any) -> bytes:
    echo = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
    return _encode({**echo, "error": {"class": error.qmp_class, "desc": str(error)}})


def _file_at(path: str) -> os.stat_result | None:
    """The status of the socket's file. None if this process, whose user may have changed since it
    bound the socket, cannot see the file; then it cannot remove the file either."""
    try:
        return os.lstat(path)
    except PermissionError:
        return None


def _log_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio's own errors, mostly that it cannot accept a client, in our log; asyncio goes on."""
    _log.error("qmp: %s: %s", context["message"], context.get("exception"))


class QmpServer:
    """Serves `listener` to up to CLIENTS_MAX clients, and owns it from here on."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        dispatch: Dispatch,
        events: EventRing,
        version: dict[str, Any],
    ) -> None:
        """`version` is the greeting's: {"qemu": {"micro", "minor", "major"}, "package"}."""
        self._listener = listener
        self._path = listener.getsockname()
        self._file = _file_at(self._path)
        self._dispatch = dispatch
        self._events = events
        self._greeting = {"QMP": {"version": version, "capabilities": []}}
        self._clients: dict[asyncio.Task[None], _Client] = {}
        self._connections = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._wake_posted = False

    def start(self) -> None:
        """Start the thread, after nbdkit has forked."""
        self._loop = asyncio.new_event_loop()  # not earlier: its descriptors must not be forked
        self._loop.set_exception_handler(_log_error)
        self._thread = threading.Thread(
            target=self._run, args=(self._loop,), name="qmp", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the server within STOP_S_MAX; commands in progress get COMMAND_GRACE_S.
        Idempotent."""
        thread, self._thread = self._thread, None
        if thread:
            self._post(self._stopping.set)
            if thread is not threading.current_thread():
                thread.join(STOP_S_MAX)
                if thread.is_alive():
                    _log.error("qmp: the thread did not end within %g s", STOP_S_MAX)
        if self._file is not None:
            remove_socket(self._path, self._file)
        if not thread:
            self._listener.close()

    def _post(self, callback: Callable[[], object]) -> None:
        if self._loop:
            with contextlib.suppress(RuntimeError):  # the loop is already closed
                self._loop.call_soon_threadsafe(callback)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._main())
        except Exception:  # noqa: BLE001 - the thread ends here; no caller could report it
            _log.exception("qmp: the server failed")
        finally:
            loop.close()

    async def _main(self) -> None:
        unsubscribe = self._events.subscribe(self._wake)
        server = await asyncio.start_unix_server(
            self._connected, sock=self._listener, limit=READ_BYTES, **_KEEP_FILE
        )
        try:
            await self._stopping.wait()
        finally:
            server.close()
            unsubscribe()
            await self._end_clients()

    async def _end_clients(self) -> None:
        for task, client in self._clients.items():
            if not client.busy:
                task.cancel()
        for grace_s in (COMMAND_GRACE_S, 2 * FLUSH_S_MAX):
            if self._clients:
                await asyncio.wait(list(self._clients), timeout=grace_s)
            for task in self._clients:
                task.cancel()

    def _wake(self) -> None:
        """Called after an event was appended, on any thread; one call covers many events."""
        if not self._wake_posted:
            self._wake_posted = True
            self._post(self._send_events)

    def _send_events(self) -> None:
        self._wake_posted = False  # before the pull: later events post again
        for client in list(self._clients.values()):
            client.send_events()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        client = _Client(f"client {self._connections}", writer, self._events)
        task = asyncio.current_task()
        assert task
        self._clients[task] = client
        try:
            if len(self._clients) > CLIENTS_MAX:
                refusal = CommandError(f"{CLIENTS_MAX} clients are connected already; try later")
                client.reply(_encode_error(refusal, None), 0)
                _log.warning("qmp: %s refused: %s", client.name, refusal)
                return
            client.send(self._greeting)
            await self._converse(reader, client)
        except ConnectionError as error:
            _log.debug("qmp: %s: %s", client.name, error)
        except asyncio.CancelledError:  # only `stop` cancels
            task.uncancel()
        finally:
            try:
                await client.close()
            finally:
                self._clients.pop(task, None)

    async def _converse(self, reader: asyncio.StreamReader, client: _Client) -> None:
        stream = JsonStream()
        errors = 0
        while data := await reader.read(READ_BYTES):
            for request in stream.feed(data):
                client.busy = True
                client.reply(*await self._answer(client, request))
                await client.drain()
                await asyncio.sleep(0)  # a packet may have thousands of commands: let others run
                errors = 0 if isinstance(request, dict) else errors + 1
                if self._stopping.is_set() or client.gone:
                    return
                fatal = isinstance(request, ParseError) and request.fatal
                if fatal or errors >= ERRORS_IN_A_ROW_MAX:
                    _log.warning("qmp: %s disconnected: it sends garbage", client.name)
                    return

    async def _answer(self, client: _Client, request: Any) -> tuple[bytes, int]:
        """The reply's line, and the number of the first event after it."""
        try:
            name, arguments = _check_request(request)
            if name == "qmp_capabilities" or not client.negotiated:
                _check_capabilities(name, arguments, client.negotiated)
                client.negotiate()
                reply = Reply({}, self._events.next_number)
            else:
                reply = await self._dispatch(name, arguments)
            echo = {"id": request["id"]} if "id" in request else {}
            return _encode({"return": reply.value, **echo}), reply.next_event
        except Error as error:
            return _encode_error(error, request), self._events.next_number
        except Exception as error:  # noqa: BLE001 - a bug in one command ends no connection
            _log.exception("qmp: internal error in %.200r", request)
            text = f"internal error: {type(error).__name__} (the server's log has the details)"
            return _encode_error(CommandError(text), request), self._events.next_number


def _check_request(request: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(request, ParseError):
        raise request
    if not isinstance(request, dict):
        raise CommandError("QMP input must be a JSON object")
    for member, value in request.items():
        if member == "execute" and not isinstance(value, str):
            raise CommandError("QMP input member 'execute' must be a string")
        if member == "arguments" and not isinstance(value, dict):
            raise CommandError("QMP input member 'arguments' must be an object")
        if member not in ("execute", "arguments", "id"):
            raise CommandError(f"QMP input member '{member}' is unexpected")
    if "execute" not in request:
        raise CommandError("QMP input lacks member 'execute'")
    return request["execute"], request.get("arguments", {})


def _check_capabilities(name: str, arguments: dict[str, Any], negotiated: bool) -> None:
    if negotiated:
        text = "Capabilities negotiation is already complete, command ignored"
        raise CommandNotFound(text)
    if name != "qmp_capabilities":
        raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
    enable = arguments.get("enable", [])
    if not isinstance(enable, list):
        raise CommandError("Invalid parameter type for 'enable', expected: array")
    for index, capability in enumerate(enable):
        if not isinstance(capability, str):
            raise CommandError(f"Invalid parameter type for 'enable[{index}]', expected: string")
        if capability != "oob":
            raise CommandError(f"Parameter 'enable[{index}]' does not accept value '{capability}'")
    for member in arguments:
        if member != "enable":
            raise CommandError(f"Parameter '{member}' is unexpected")
    if enable:
        raise CommandError("Capability oob not available")
