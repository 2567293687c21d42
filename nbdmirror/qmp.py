"""QMP as QEMU speaks it: the socket, the JSON stream, the conversation. No command lives here.

`bind_unix_socket` runs before nbdkit forks and starts no thread. `QmpServer.start` makes one daemon
thread with an asyncio loop that owns every connection; `dispatch` is called in it and must not
block. `start` and `stop` may be called from any thread.

Promises:
- Input is a stream of JSON values; no newline is needed. Each byte is looked at a bounded number of
  times, however it was cut into packets, and what is kept of an unfinished value is bounded.
- The commands of one client run one at a time, in order. Before a reply is written, every event
  appended until the dispatch returned is: a command's events precede its return, as in QEMU.
- A client that does not read, sends garbage or leaves harms no other and not the server.

Texts and resynchronisation were compared with qemu-storage-daemon 7.2. Where we differ: limits are
smaller and passing one ends the connection (QEMU goes on with the middle of the value), and so does
a long row of errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import socket
import stat
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from nbdmirror.errors import CommandError, CommandNotFound, ConfigError, Error
from nbdmirror.events import EventRing

Dispatch = Callable[[str, dict[str, Any]], Awaitable[Any]]

VALUE_BYTES_MAX = 1 << 20
"""Tokens of one value. The longest real command, a transaction over many disks, has kilobytes;
QEMU's 64 MiB would let each client take that much of a process that serves guests."""
VALUE_TOKENS_MAX = 1 << 16
"""QEMU: 2 Mi. A token costs us some 100 bytes, so this is 6 MiB a client at worst."""
DEPTH_MAX = 128
"""QEMU: 1024. QMP's schema needs less than ten; two Python frames a level stay far from the
interpreter's limit of 1000."""
WORD_BYTES_MAX = 1024
"""Numbers and keywords: looked at again from their start when a packet ends within one."""
ERRORS_IN_A_ROW_MAX = 1024
"""Inputs that are no JSON object without one that is between them, then the connection is closed:
each costs us a reply, and whoever sends this is no QMP client."""
OUTPUT_BYTES_MAX = 4 << 20
"""What waits for a client beyond the kernel's buffer: some 20,000 events. QEMU's own client cannot
read a line above 10 MB, so no reply comes near."""
CLIENTS_MAX = 32
"""An operator, a few tools, a monitor. With the bounds above: 350 MiB if all 32 are hostile."""
STOP_S_MAX = 5.0
COMMAND_GRACE_S = 2.0
"""How long `stop` lets commands under way end, `quit` before all, so that they are answered."""
FLUSH_S_MAX = 0.5
READ_BYTES = 1 << 16

_log = logging.getLogger(__name__)

_SPACE = re.compile(rb"[ \t\r\n]*")
_RECOVERY = re.compile(rb"[^{}\[\]:,\x00-\x1f\xfe\xff]*")
_WORD = re.compile(rb"[a-z]+|[-0-9][-+.0-9eE]*")
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_STRING = {  # up to the closing quote, a byte that no string may hold, or an escape cut in two
    q: re.compile(rb"(?:[^\\\x00-\x1f\xfe\xff" + q + rb"]++|\\[\x20-\xfd])*+") for q in (b'"', b"'")
}
_ESCAPE = re.compile(
    r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})"
    r"|\\u([0-9a-fA-F]{4})|\\(u.{0,4}|.)",
    re.DOTALL,
)
_SIMPLE_ESCAPES = dict(zip("\"'\\/bfnrt", "\"'\\/\b\f\n\r\t", strict=True))


class ParseError(CommandError):
    """The input is not JSON. `fatal`: a limit was passed, the stream cannot be followed on."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


def _syntax(message: str) -> ParseError:
    return ParseError(f"JSON parse error, {message}")


class JsonStream:
    """Cuts a byte stream into JSON values. Pure: no I/O, one owner.

    As in QEMU, tokens are gathered until brackets balance and are then parsed as one value; after a
    byte that starts no token, everything up to a structural or control character is skipped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._quote = b""
        self._string = bytearray()
        self._recovering = False
        self._begin_value()

    def _begin_value(self) -> None:
        self._tokens: list[bytes] = []
        self._bytes = self._braces = self._brackets = 0

    def feed(self, data: bytes) -> Iterator[Any]:
        """Each value (or ParseError, as an object) that `data` completes; exhaust it before the
        next call. After a fatal error the stream is not to be used any more."""
        buf = self._rest + data
        self._rest = b""
        position = 0
        while position < len(buf):
            try:
                token, position = self._next_token(buf, position)
                if token and self._push(token):
                    value = _parse(self._tokens)
                    self._begin_value()
                    yield value
            except _Stray as stray:
                position = stray.position
                self._begin_value()
                self._recovering = True
                text = stray.text[:WORD_BYTES_MAX].split(b"\0")[0]
                yield _syntax(f"stray '{text.decode(errors='replace')}'")
            except ParseError as error:
                yield error
                if error.fatal:
                    return
                self._begin_value()

    def _next_token(self, buf: bytes, position: int) -> tuple[bytes, int]:
        """A token and the position behind it; an empty one if `buf` ends before the token does."""
        if self._quote:
            return self._go_on_string(buf, position)
        skipped = _RECOVERY if self._recovering else _SPACE
        if match := skipped.match(buf, position):
            position = match.end()
        if position == len(buf):
            return b"", position
        self._recovering = False
        byte = buf[position : position + 1]
        if byte in b"{}[]:,":
            return byte, position + 1
        if byte in b"\"'":
            self._quote = byte
            self._string = bytearray(byte)
            return b"", position + 1
        if byte in b" \t\r\n":  # what ended a recovery
            return b"", position + 1
        match = _WORD.match(buf, position)
        if not match:
            raise _Stray(byte, position + 1)
        if match.end() - position > WORD_BYTES_MAX:
            raise ParseError("JSON token size limit exceeded", fatal=True)
        if match.end() == len(buf):
            self._rest = buf[position:]
            return b"", len(buf)
        word = match.group()
        if not byte.isalpha() and not _NUMBER.fullmatch(word):
            raise _Stray(word, match.end())
        return word, match.end()

    def _go_on_string(self, buf: bytes, position: int) -> tuple[bytes, int]:
        match = _STRING[self._quote].match(buf, position)
        assert match
        end = match.end()
        self._string += buf[position:end]
        if self._bytes + len(self._string) > VALUE_BYTES_MAX:
            raise ParseError("JSON token size limit exceeded", fatal=True)
        if end == len(buf):
            return b"", end
        if buf[end:] == b"\\":
            self._rest = b"\\"
            return b"", len(buf)
        quote, self._quote = self._quote, b""
        if buf[end : end + 1] == quote:
            return bytes(self._string), end + 1
        end += buf[end] == 0x5C
        raise _Stray(bytes(self._string) + buf[end : end + 1], end + 1)

    def _push(self, token: bytes) -> bool:
        """Add a token; True when it completes a value, a correct one or not."""
        self._tokens.append(token)
        self._bytes += len(token)
        self._braces += (token == b"{") - (token == b"}")
        self._brackets += (token == b"[") - (token == b"]")
        if min(self._braces, self._brackets) < 0 or self._braces == self._brackets == 0:
            return True
        for what, size, limit in (
            ("token size", self._bytes, VALUE_BYTES_MAX),
            ("token count", len(self._tokens), VALUE_TOKENS_MAX),
            ("nesting depth", self._braces + self._brackets, DEPTH_MAX),
        ):
            if size > limit:
                raise ParseError(f"JSON {what} limit exceeded", fatal=True)
        return False


class _Stray(Exception):
    def __init__(self, text: bytes, position: int) -> None:
        super().__init__()
        self.text, self.position = text, position


def _parse(tokens: list[bytes]) -> Any:
    """The value that `tokens` spell. Strings are tokens without their closing quote."""
    source = iter(tokens)
    return _value(next(source), source)


def _value(token: bytes, source: Iterator[bytes]) -> Any:
    first = token[:1]
    if first in b"\"'":
        return _string(token)
    if first in b"-0123456789":
        return _number(token)
    if first.isalpha():
        if token not in (b"true", b"false", b"null"):
            raise _syntax(f"invalid keyword '{token.decode()}'")
        return {b"true": True, b"false": False}.get(token)
    if first == b"[":
        return _array(source)
    if first == b"{":
        return _object(source)
    raise _syntax("expecting value")


def _array(source: Iterator[bytes]) -> list[Any]:
    values: list[Any] = []
    token = next(source, b"]")
    while values or token != b"]":
        values.append(_value(token, source))
        token = next(source, b"]")
        if token == b"]":
            break
        if token != b",":
            raise _syntax("expected separator in list")
        token = next(source, b"]")
    return values


def _object(source: Iterator[bytes]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    token = next(source, b"}")
    while members or token != b"}":
        key = _value(token, source)
        if not isinstance(key, str):
            raise _syntax("key is not a string in object")
        if next(source, b"") != b":":
            raise _syntax("missing : in object pair")
        if key in members:
            raise _syntax("duplicate key")
        members[key] = _value(next(source, b"}"), source)
        token = next(source, b"}")
        if token == b"}":
            break
        if token != b",":
            raise _syntax("expected separator in dict")
        token = next(source, b"}")
    return members


def _number(token: bytes) -> int | float:
    """As QEMU: an integer that fits 64 bits stays one, anything else is a double."""
    if not set(token) & set(b".eE") and -(1 << 63) <= int(token) < 1 << 64:
        return int(token)
    number = float(token)
    if number in (float("inf"), float("-inf")):  # QEMU echoes `inf`, which is not JSON
        raise _syntax(f"number out of range '{token.decode()}'")
    return number


def _string(token: bytes) -> str:
    try:
        text = token[1:].decode()
    except UnicodeDecodeError:
        raise _syntax("invalid UTF-8 sequence in string") from None
    return _ESCAPE.sub(_unescape, text) if "\\" in text else text


def _unescape(match: re.Match[str]) -> str:
    high, low, unit, other = match.groups()
    if high:
        return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF))
    if unit and not 0xD800 <= int(unit, 16) < 0xE000:
        return chr(int(unit, 16))
    if unit or other[0] == "u":
        raise _syntax(f"{match.group()} is not a valid Unicode character")
    if other not in _SIMPLE_ESCAPES:
        raise _syntax("invalid escape sequence in string")
    return _SIMPLE_ESCAPES[other]


def bind_unix_socket(path: str, *, parameter: str = "qmp") -> socket.socket:
    """A listening Unix socket at `path`, mode 0600 from its first moment.

    A socket file that nobody listens on any more is taken over; anything else at `path` is left
    alone. Raises ConfigError, which starts with `parameter`. For use before nbdkit forks.
    """
    path = os.path.abspath(path)  # nbdkit changes to / when it goes into the background
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        remove_stale_socket(path, parameter)
        # Linux creates the file with the mode of the socket's own inode: no umask to juggle with.
        os.fchmod(listener.fileno(), stat.S_IRUSR | stat.S_IWUSR)
        listener.bind(path)
        listener.listen(CLIENTS_MAX)
    except OSError as error:
        listener.close()
        if error.errno is None:  # Python's own check of sun_path's 108 bytes
            reason = "the path is too long for a Unix socket (107 bytes at most)"
        elif error.errno == errno.ENOENT:
            reason = "its directory does not exist"
        elif error.errno == errno.EADDRINUSE:
            reason = "is in use by another process"
        else:
            reason = error.strerror or str(error)
        raise ConfigError(f"{parameter}: {path}: {reason}") from error
    except ConfigError:
        listener.close()
        raise
    return listener


def remove_stale_socket(path: str, parameter: str) -> None:
    """Make `path` free to bind if only a dead server's socket is there; else raise ConfigError."""
    try:
        before = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(before.st_mode):
        raise ConfigError(f"{parameter}: {path}: exists and is not a socket; it was left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a live server with a full backlog says EAGAIN
        answer = probe.connect_ex(path)
    if answer == errno.ECONNREFUSED and os.path.samestat(before, os.lstat(path)):
        os.unlink(path)
    elif answer != errno.ENOENT:
        raise ConfigError(f"{parameter}: {path}: is in use by another process")


class _Client:
    """One connection. Touched only in the loop's thread."""

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

    def reply(self, line: bytes) -> None:
        self.send_events()
        self._send_line(line)

    def send_events(self) -> None:
        if self._next_event is None or self.gone:
            return
        for event in self._events.pull(self._next_event):
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
        """Close when what was written has gone out, or after a bound."""
        self.send_events()
        self._writer.close()
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), FLUSH_S_MAX)
        self._writer.transport.abort()


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, allow_nan=False).encode() + b"\r\n"


def _encode_error(error: Error, request: Any) -> bytes:
    echo = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
    return _encode({**echo, "error": {"class": error.qmp_class, "desc": str(error)}})


class QmpServer:
    """Serves `listener` to any number of clients up to CLIENTS_MAX; owns it from here on."""

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
        self._file = os.stat(self._path)
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
        """Start the thread. To be called after nbdkit has forked."""
        self._loop = asyncio.new_event_loop()  # not before: its descriptors must not be forked
        self._thread = threading.Thread(
            target=self._run, args=(self._loop,), name="qmp", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End it within STOP_S_MAX; commands under way get COMMAND_GRACE_S. Idempotent."""
        thread, self._thread = self._thread, None
        if thread:
            self._post(self._stopping.set)
            if thread is not threading.current_thread():
                thread.join(STOP_S_MAX)
                if thread.is_alive():
                    _log.error("qmp: the thread did not end within %g s", STOP_S_MAX)
        with contextlib.suppress(OSError):
            if os.path.samestat(self._file, os.stat(self._path)):
                os.unlink(self._path)
        if not thread:
            self._listener.close()

    def _post(self, callback: Callable[[], object]) -> None:
        if self._loop:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(callback)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._main())
        except Exception:  # noqa: BLE001 - the thread's end; nobody above could report it
            _log.exception("qmp: the server failed")
        finally:
            loop.close()

    async def _main(self) -> None:
        unsubscribe = self._events.subscribe(self._wake)
        server = await asyncio.start_unix_server(
            self._connected, sock=self._listener, limit=READ_BYTES
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
        """Called by whoever appended an event, in any thread; one call covers many events."""
        if not self._wake_posted:
            self._wake_posted = True
            self._post(self._send_events)

    def _send_events(self) -> None:
        self._wake_posted = False  # before the pull: what comes after it posts again
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
                client.reply(_encode_error(refusal, None))
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
                client.reply(await self._answer(client, request))
                client.busy = False
                await client.drain()
                await asyncio.sleep(0)  # a packet may hold thousands of commands: others' turn
                errors = 0 if isinstance(request, dict) else errors + 1
                if self._stopping.is_set() or client.gone:
                    return
                fatal = isinstance(request, ParseError) and request.fatal
                if fatal or errors >= ERRORS_IN_A_ROW_MAX:
                    _log.warning("qmp: %s disconnected: it sends garbage", client.name)
                    return

    async def _answer(self, client: _Client, request: Any) -> bytes:
        try:
            name, arguments = _check_request(request)
            if name == "qmp_capabilities" or not client.negotiated:
                _check_capabilities(name, arguments, client.negotiated)
                client.negotiate()
                result: Any = {}
            else:
                result = await self._dispatch(name, arguments)
            echo = {"id": request["id"]} if "id" in request else {}
            return _encode({"return": result, **echo})
        except Error as error:
            return _encode_error(error, request)
        except Exception as error:  # noqa: BLE001 - a bug in one command ends no connection
            _log.exception("qmp: internal error in %.200r", request)
            text = f"internal error: {type(error).__name__} (the server's log has the details)"
            return _encode_error(CommandError(text), request)


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
