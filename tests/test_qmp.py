"""QMP, over real Unix sockets: what QEMU says word by word, and what a bad client can do."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import select
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qemu.qmp import EventListener, ExecuteError, QMPClient

from nbdmirror import qmp, qmp_json, sockets
from nbdmirror.errors import CommandError, CommandNotFound, ConfigError, DeviceNotActive
from nbdmirror.events import EVENTS_KEPT_MAX, EventRing, Reply

WAIT_S_MAX = 10.0
VERSION = {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": "nbdmirror"}
EXPECTING = "JSON parse error, expecting value"
NOT_OBJECT = "QMP input must be a JSON object"


class Server:
    """A QmpServer whose commands are made for these tests."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.ring = EventRing(lambda: 1.000002)
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.running = 0
        self.qmp = qmp.QmpServer(
            sockets.bind_unix_socket(path),
            dispatch=self.dispatch,
            events=self.ring,
            version=VERSION,
        )

    async def dispatch(self, name: str, arguments: dict[str, Any]) -> Any:
        assert self.running == 0 or arguments.get("shared")
        self.running += 1
        try:
            method = getattr(self, f"do_{name.replace('-', '_')}", self.missing)
            value = await method(name, arguments)
            return Reply(value, self.ring.next_number)
        finally:
            self.running -= 1

    async def missing(self, name: str, arguments: dict[str, Any]) -> Any:
        raise CommandNotFound(f"The command {name} has not been found")

    async def do_echo(self, name: str, arguments: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        return arguments

    async def do_emit(self, name: str, arguments: dict[str, Any]) -> Any:
        for number in range(arguments.get("count", 1)):
            self.ring.append("E", {"number": number, "pad": "x" * arguments.get("pad", 0)})
        return {}

    async def do_refuse(self, name: str, arguments: dict[str, Any]) -> Any:
        raise DeviceNotActive("Block job 'j' not found")

    async def do_crash(self, name: str, arguments: dict[str, Any]) -> Any:
        raise ZeroDivisionError("secret")

    async def do_unencodable(self, name: str, arguments: dict[str, Any]) -> Any:
        return {"x": object()}

    async def do_wait(self, name: str, arguments: dict[str, Any]) -> Any:
        self.entered.set()
        opened = await asyncio.to_thread(self.gate.wait, WAIT_S_MAX)
        return {"opened": opened}


class Raw:
    """A client that sends what it likes and reads lines."""

    def __init__(self, path: str, *, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(WAIT_S_MAX)
        self.socket.connect(path)
        self.reader = self.socket.makefile("rb")
        if negotiate:
            assert "QMP" in self.read()
            assert self.ask({"execute": "qmp_capabilities"}) == {"return": {}}

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> dict[str, Any]:
        line = self.reader.readline()
        assert line.endswith(b"\r\n"), line
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def ask(self, request: Any) -> dict[str, Any]:
        self.send(json.dumps(request).encode())
        return self.read()

    def answers(self, data: bytes) -> list[dict[str, Any]]:
        """Everything that the server says until the answer to a last, good command."""
        self.send(data + b'\n{"execute": "echo", "id": "last"}')
        found: list[dict[str, Any]] = []
        while (message := self.read()).get("id") != "last":
            found.append(message)
        return found

    def errors(self, data: bytes) -> list[str]:
        return [answer["error"]["desc"] for answer in self.answers(data)]

    def at_end(self) -> bool:
        return self.reader.readline() == b""

    def close(self) -> None:
        self.reader.close()
        self.socket.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(str(tmp_path / "qmp"))
    server.qmp.start()
    yield server
    server.gate.set()
    server.qmp.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "qmp"]


@pytest.fixture
def connect(server: Server) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def connect(**options: Any) -> Raw:
            client = Raw(server.path, **options)
            stack.callback(client.close)
            return client

        yield connect


def wait_until(condition: Any) -> None:
    """Bounded; polls without a sleep by waiting on nothing."""
    deadline = time.monotonic() + WAIT_S_MAX
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.005)


# The socket file


def test_socket_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with sockets.bind_unix_socket(str(tmp_path / "s")):
            assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o600
    finally:
        os.umask(before)


def test_stale_socket_is_taken_over_and_live_one_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    sockets.bind_unix_socket(path).close()
    with sockets.bind_unix_socket(path):
        with pytest.raises(ConfigError, match=f"^qmp: {path}: is in use by another process$"):
            sockets.bind_unix_socket(path)
        assert os.path.exists(path)


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_what_is_not_a_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"http: .*exists and is not a socket"):
        sockets.bind_unix_socket(str(path), parameter="http")
    assert path.is_symlink() or path.exists()


def test_bad_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        sockets.bind_unix_socket(str(tmp_path / ("x" * 108)))
    with pytest.raises(ConfigError, match="directory does not exist"):
        sockets.bind_unix_socket(str(tmp_path / "no" / "s"))


def test_stop_unlinks_only_its_own_socket_and_is_idempotent(tmp_path: Path) -> None:
    server = Server(str(tmp_path / "s"))
    server.qmp.start()
    os.unlink(server.path)
    with sockets.bind_unix_socket(server.path):
        server.qmp.stop()
        server.qmp.stop()
        assert os.path.exists(server.path)
    never_started = Server(server.path)
    never_started.qmp.stop()
    assert not os.path.exists(server.path)


# The conversation, as QEMU's


def test_greeting_and_negotiation(connect: Any) -> None:
    client = connect(negotiate=False)
    assert client.read() == {"QMP": {"version": VERSION, "capabilities": []}}
    expecting = "Expecting capabilities negotiation with 'qmp_capabilities'"
    assert client.ask({"execute": "echo", "id": 1}) == {
        "id": 1,
        "error": {"class": "CommandNotFound", "desc": expecting},
    }
    for arguments, text in (
        ({"enable": "x"}, "Invalid parameter type for 'enable', expected: array"),
        ({"enable": ["oob", 1]}, "Invalid parameter type for 'enable[1]', expected: string"),
        ({"enable": ["x"]}, "Parameter 'enable[0]' does not accept value 'x'"),
        ({"enable": ["oob"]}, "Capability oob not available"),
        ({"x": 1}, "Parameter 'x' is unexpected"),
    ):
        answer = client.ask({"execute": "qmp_capabilities", "arguments": arguments})
        assert answer == {"error": {"class": "GenericError", "desc": text}}
    done = client.ask({"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": [1]})
    assert done == {"return": {}, "id": [1]}
    again = client.ask({"execute": "qmp_capabilities", "id": {}})
    assert again["id"] == {}
    assert again["error"] == {
        "class": "CommandNotFound",
        "desc": "Capabilities negotiation is already complete, command ignored",
    }


@pytest.mark.parametrize("value", [None, True, -1, 2.5, "é\U0001f600\0\n", [1, {"a": []}], 2**63])
def test_id_is_echoed(connect: Any, value: Any) -> None:
    client = connect()
    assert client.ask({"execute": "echo", "id": value}) == {"return": {}, "id": value}
    assert client.ask({"execute": "none", "id": value})["id"] == value


TABLE: list[tuple[bytes, list[str]]] = [
    (b"[]", [NOT_OBJECT]),
    (b'5 "x" null true\n', [NOT_OBJECT] * 4),
    (b"5{}", [NOT_OBJECT, "QMP input lacks member 'execute'"]),
    (b"{}", ["QMP input lacks member 'execute'"]),
    (b'{"x":1}', ["QMP input member 'x' is unexpected"]),
    (b'{"execute":"e","exec-oob":"e"}', ["QMP input member 'exec-oob' is unexpected"]),
    (b'{"execute":null}', ["QMP input member 'execute' must be a string"]),
    (b'{"execute":"e","arguments":null}', ["QMP input member 'arguments' must be an object"]),
    (b'{"execute":"e","execute":"e"}', ["JSON parse error, duplicate key"]),
    (b"}", [EXPECTING]),
    (b"{]", [EXPECTING]),
    (b"[}", [EXPECTING]),
    (b"{,}", [EXPECTING]),
    (b'{"a":1,}', [EXPECTING]),
    (b"[1,]", [EXPECTING]),
    (b'{"execute" "x"}', ["JSON parse error, missing : in object pair"]),
    (b"[1 2]", ["JSON parse error, expected separator in list"]),
    (b'{"a":1 "b":2}', ["JSON parse error, expected separator in dict"]),
    (b"{5:1}", ["JSON parse error, key is not a string in object"]),
    (b"foo ", ["JSON parse error, invalid keyword 'foo'"]),
    (b"@@@@", ["JSON parse error, stray '@'"]),
    (b'@ @ "x" 5', ["JSON parse error, stray '@'"]),
    (b"01 ", ["JSON parse error, stray '01'"]),
    (b".5 ", ["JSON parse error, stray '.'"]),
    (b"\x00\x00\x00", ["JSON parse error, stray ''"] * 3),
    (b"\xff\xfe\xfd", ["JSON parse error, stray '\ufffd'"] * 2),
    (b'{"execute":"x\x00y"}', ["JSON parse error, stray '\"x'", EXPECTING]),
    (b'{"execute":"\xff"}', ["JSON parse error, stray '\"\ufffd'", EXPECTING]),
    (b'"abc\n"', ["JSON parse error, stray '\"abc\n'"]),
    (b'"\xed\xa0\x80"', ["JSON parse error, invalid UTF-8 sequence in string"]),
    (b'"\\q"', ["JSON parse error, invalid escape sequence in string"]),
    (b'"\\u00zz"', ["JSON parse error, \\u00zz is not a valid Unicode character"]),
    (b'"\\ud800"', ["JSON parse error, \\ud800 is not a valid Unicode character"]),
    (
        b'{"execute":"foo" @,"id":1}',
        [
            "JSON parse error, stray '@'",
            EXPECTING,
            NOT_OBJECT,
            EXPECTING,
            NOT_OBJECT,
            EXPECTING,
        ],
    ),
]


@pytest.mark.parametrize(("data", "texts"), TABLE)
def test_texts_and_resynchronisation_are_qemus(connect: Any, data: bytes, texts: list[str]) -> None:
    assert connect().errors(data) == texts


def listens(path: str) -> bool:
    """The file is there a moment earlier than somebody who answers."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def test_the_table_is_what_qemu_says(tmp_path: Path) -> None:
    daemon = shutil.which("qemu-storage-daemon")
    if not daemon:
        pytest.skip("qemu-storage-daemon is not installed: nothing to compare with")
    path = str(tmp_path / "qemu")
    chardev = f"socket,id=c,path={path},server=on,wait=off"
    process = subprocess.Popen([daemon, "--chardev", chardev, "--monitor", "chardev=c"])
    try:
        wait_until(lambda: listens(path))
        with contextlib.closing(Raw(path)) as client:
            for data, texts in TABLE:
                assert (data, client.errors(data)) == (data, texts)
    finally:
        process.kill()
        process.wait(WAIT_S_MAX)


def test_single_quotes_escapes_and_numbers(connect: Any) -> None:
    client = connect()
    client.send(rb"""{'execute':'echo','id':'a\'"\u00e9\ud83d\ude00\/'}""")
    assert client.read()["id"] == "a'\"é\U0001f600/"
    client.send(b'{"execute":"echo","id":[1e3,-0,12345678901234567890,123456789012345678901]}')
    assert client.read()["id"] == [1000, 0, 12345678901234567890, 1.2345678901234568e20]


def test_errors_of_commands(connect: Any, caplog: pytest.LogCaptureFixture) -> None:
    client = connect()
    answer = client.ask({"execute": "refuse"})
    assert answer == {"error": {"class": "DeviceNotActive", "desc": "Block job 'j' not found"}}
    for command in ("crash", "unencodable"):
        answer = client.ask({"execute": command, "id": 1})
        assert answer["id"] == 1
        assert answer["error"]["class"] == "GenericError"
        assert "internal error" in answer["error"]["desc"]
        assert "secret" not in answer["error"]["desc"]
    assert "ZeroDivisionError: secret" in caplog.text
    assert client.ask({"execute": "echo"}) == {"return": {}}


def test_commands_of_one_packet_run_one_at_a_time_in_order(connect: Any) -> None:
    client = connect()
    client.send(b"".join(b'{"execute":"echo","id":%d}' % number for number in range(200)))
    assert [client.read()["id"] for _ in range(200)] == list(range(200))


def test_a_slow_command_delays_only_its_client(server: Server, connect: Any) -> None:
    slow, other = connect(), connect()
    slow.send(b'{"execute":"wait","arguments":{"shared":true}}{"execute":"echo"}')
    assert server.entered.wait(WAIT_S_MAX)
    assert other.ask({"execute": "echo", "arguments": {"shared": 1}})["return"] == {"shared": 1}
    server.gate.set()
    assert slow.read() == {"return": {"opened": True}}
    assert slow.read() == {"return": {}}


# Events


def test_events_precede_the_reply_and_reach_everybody(server: Server, connect: Any) -> None:
    one, two, deaf = connect(), connect(), connect(negotiate=False)
    deaf.read()
    one.send(b'{"execute":"emit","arguments":{"count":2}}')
    event = {"timestamp": {"seconds": 1, "microseconds": 2}, "event": "E"}
    expected = [{**event, "data": {"number": number, "pad": ""}} for number in (0, 1)]
    assert [one.read(), one.read(), one.read()] == [*expected, {"return": {}}]
    assert [two.read(), two.read()] == expected
    assert deaf.ask({"execute": "qmp_capabilities"}) == {"return": {}}
    server.ring.append("BARE", {})
    for client in (one, two, deaf):
        assert client.read() == {**event, "event": "BARE"}


def test_events_of_many_threads_arrive_once_and_in_order(server: Server, connect: Any) -> None:
    client = connect()

    def append() -> None:
        for number in range(500):
            server.ring.append("T", {"number": number})

    threads = [threading.Thread(target=append) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = [client.read()["data"]["number"] for _ in range(2000)]
    for thread in threads:
        thread.join(WAIT_S_MAX)
    assert sorted(seen) == sorted(list(range(500)) * 4)


# Clients that misbehave


def test_a_client_that_never_reads_is_dropped(
    server: Server, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    deaf, good = connect(), connect()
    while "does not read" not in caplog.text:
        good.send(b'{"execute":"emit","arguments":{"pad":200000}}')
        assert good.read()["event"] == "E"
        assert good.read() == {"return": {}}
        assert server.ring.next_number < 200
    while deaf.socket.recv(1 << 20):
        pass


def test_a_client_that_missed_events_is_dropped(
    server: Server, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect()
    client.send(b'{"execute":"emit","arguments":{"count":%d}}' % (EVENTS_KEPT_MAX + 3))
    assert client.at_end()
    assert "missed 3 events" in caplog.text


def test_many_clients_are_refused_not_served_badly(server: Server, connect: Any) -> None:
    clients = [connect() for _ in range(qmp.CLIENTS_MAX)]
    late = connect(negotiate=False)
    assert "32 clients" in late.read()["error"]["desc"]
    assert late.at_end()
    clients.pop().close()

    def is_served() -> bool:
        with contextlib.closing(Raw(server.path, negotiate=False)) as client:
            return "QMP" in client.read()

    wait_until(is_served)


def test_half_a_command_and_gone(connect: Any) -> None:
    connect().send(b'{"execute":"ec')
    closed = connect()
    closed.send(b'{"execute":"wait"')
    closed.close()
    assert connect().ask({"execute": "echo"}) == {"return": {}}


def test_half_closed_client_gets_its_answers(connect: Any) -> None:
    client = connect()
    client.send(b'{"execute":"echo"}{"execute":"none"}')
    client.socket.shutdown(socket.SHUT_WR)
    assert client.read() == {"return": {}}
    assert "error" in client.read()
    assert client.at_end()


@pytest.mark.parametrize(
    ("piece", "what"),
    [
        (b"x" * 65536, "size"),
        (b'"' + b"x" * 65535, "size"),
        (b"1" * 65536, "size"),
        (b"[" * 65536, "depth"),
        (b"[" + b"1," * 32768, "count"),
        (b'["' + b"x" * 60000 + b'",', "size"),
    ],
)
def test_megabytes_of_one_value_get_one_error(connect: Any, piece: bytes, what: str) -> None:
    client = connect()
    middle = piece[1:] if piece[-1:] in b"x," else piece
    with contextlib.suppress(ConnectionError):
        client.send(piece)
        for _ in range(1600):
            client.send(middle)
    answer = client.read()["error"]["desc"]
    assert answer.startswith(f"JSON {'nesting' if what == 'depth' else 'token'} {what}")
    assert answer.endswith("limit exceeded")
    with contextlib.suppress(ConnectionError):
        assert client.at_end()


def test_a_long_row_of_errors_ends_the_connection(connect: Any) -> None:
    client = connect()
    client.send(b"}" * 5000)
    for _ in range(qmp.ERRORS_IN_A_ROW_MAX):
        assert client.read()["error"]["desc"] == EXPECTING
    with contextlib.suppress(ConnectionError):
        assert client.at_end()


def test_parsing_is_linear_and_bounded() -> None:
    """100 MB in small pieces: white space, garbage, and one value of almost a MiB byte by byte."""
    stream = qmp_json.JsonStream()
    started_s = time.process_time()
    value = b'{"a":"' + b"x" * 1_000_000 + b'"}'
    results = [found for byte in value for found in stream.feed(bytes((byte,)))]
    assert results == [{"a": "x" * 1_000_000}]
    for piece in (b" " * 4096, b"@" * 4096):
        count = sum(len(list(stream.feed(piece))) for _ in range(25_000))
        assert count <= 1
    assert len(stream._rest) + len(stream._string) < 2 << 20
    assert time.process_time() - started_s < WAIT_S_MAX


# The ends


def test_stop_answers_the_command_under_way(server: Server, connect: Any) -> None:
    client, idle = connect(), connect()
    client.send(b'{"execute":"wait"}')
    assert server.entered.wait(WAIT_S_MAX)
    stopper = threading.Thread(target=server.qmp.stop)
    stopper.start()
    assert idle.at_end()
    server.ring.append("SHUTDOWN", {})
    server.gate.set()
    assert client.read()["event"] == "SHUTDOWN"
    assert client.read() == {"return": {"opened": True}}
    assert client.at_end()
    stopper.join(WAIT_S_MAX)
    assert not os.path.exists(server.path)
    server.ring.append("LATE", {})


def test_stop_does_not_wait_for_ever(
    server: Server, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "COMMAND_GRACE_S", 0.05)
    client = connect()
    client.send(b'{"execute":"wait"}')
    assert server.entered.wait(WAIT_S_MAX)
    started_s = time.monotonic()
    server.qmp.stop()
    assert time.monotonic() - started_s < qmp.STOP_S_MAX
    assert client.at_end()


def test_qemus_own_client(server: Server) -> None:
    async def talk() -> None:
        client = QMPClient("test")
        await client.connect(server.path)
        try:
            assert client.greeting
            assert client.greeting.QMP.version["package"] == "nbdmirror"
            with client.listener("E") as listener:
                assert isinstance(listener, EventListener)
                assert await client.execute("emit", {"count": 3}) == {}
                assert len(listener.clear()) == 3
            with pytest.raises(ExecuteError, match="not found") as refused:
                await client.execute("refuse")
            assert refused.value.error_class == "DeviceNotActive"
            both = [client.execute("echo", {"n": n, "shared": 1}) for n in range(20)]
            assert [answer["n"] for answer in await asyncio.gather(*both)] == list(range(20))  # type: ignore[index]
        finally:
            await client.disconnect()

    asyncio.run(asyncio.wait_for(talk(), WAIT_S_MAX))


# Any stream, any cut


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
PIECES = st.lists(
    JSON.map(lambda value: json.dumps(value).encode() + b" ")
    | JSON.map(lambda value: json.dumps(value, ensure_ascii=False).encode() + b"\n")
    | st.binary(max_size=8)
    | st.sampled_from([b'{"execute":"x', b'"}', b"\\", b"'", b'"', b"[{", b"@"]),
    max_size=12,
)


def results(stream: qmp_json.JsonStream, chunks: list[bytes]) -> list[Any]:
    found = [value for chunk in chunks for value in stream.feed(chunk)]
    return [str(value) if isinstance(value, CommandError) else [value] for value in found]


@given(pieces=PIECES, cuts=st.lists(st.integers(0, 200), max_size=20))
def test_any_chunking_gives_the_same_values(pieces: list[bytes], cuts: list[int]) -> None:
    data = b"".join(pieces) + b"\n"
    bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    whole = results(qmp_json.JsonStream(), [data])
    parts = [data[start:end] for start, end in itertools.pairwise(bounds)]
    assert results(qmp_json.JsonStream(), parts) == whole
    assert results(qmp_json.JsonStream(), [bytes((byte,)) for byte in data]) == whole


@given(values=st.lists(JSON, max_size=5), spaces=st.sampled_from(["", " ", "\r\n\t"]))
def test_valid_json_is_read_as_the_json_module_does(values: list[Any], spaces: str) -> None:
    for value in values:
        text = json.dumps(
            [value], ensure_ascii=bool(spaces), separators=(f",{spaces}", f":{spaces}")
        )
        assert list(qmp_json.JsonStream().feed(text.encode())) == [[value]]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chunks=st.lists(PIECES.map(b"".join) | st.binary(max_size=3000), min_size=1, max_size=5))
def test_garbage_harms_no_other_client(server: Server, chunks: list[bytes]) -> None:
    logging.getLogger("nbdmirror.qmp").setLevel(logging.CRITICAL)
    with contextlib.closing(Raw(server.path)) as good:
        with contextlib.closing(Raw(server.path)) as bad:
            with contextlib.suppress(ConnectionError):
                for chunk in chunks:
                    bad.send(chunk)
            assert good.ask({"execute": "echo", "id": 1}) == {"return": {}, "id": 1}
        assert good.ask({"execute": "echo", "id": 2}) == {"return": {}, "id": 2}
    logging.getLogger("nbdmirror.qmp").setLevel(logging.NOTSET)
