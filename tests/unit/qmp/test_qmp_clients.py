"""QMP over real Unix sockets: events, what a bad client can do, the ends, any stream of bytes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import socket
import threading
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qemu.qmp import EventListener, ExecuteError, QMPClient
from support.jsonfuzz import held_bytes
from support.waiting import wait_until
from unit.qmp.qmpparts import NOT_OBJECT, WAIT_S_MAX, Raw, Server

from nbdmirror.errors import CommandError
from nbdmirror.events import EVENTS_KEPT_MAX
from nbdmirror.qmp import json_stream as qmp_json
from nbdmirror.qmp import server as qmp

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

    wait_until(is_served, "it is served", WAIT_S_MAX)


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
        (b"[" + b"x" * 65535, "size"),
        (b'["' + b"x" * 65534, "size"),
        (b"[" + b"1" * 65535, "size"),
        (b"[" + b" " * 65535, "size"),
        (b"[" * 65536, "depth"),
        (b"[" + b"1," * 32768, "count"),
        (b'["' + b"x" * 60000 + b'",', "size"),
    ],
)
def test_megabytes_of_one_value_get_one_error(connect: Any, piece: bytes, what: str) -> None:
    client = connect()
    middle = piece[2:] if piece[-1:] in b"x1, " else piece
    with contextlib.suppress(ConnectionError):
        client.send(piece)
        for _ in range(1600):
            client.send(middle)
    answer = client.read()["error"]["desc"]
    assert answer.startswith(f"JSON {'nesting' if what == 'depth' else 'token'} {what}")
    assert answer.endswith("limit exceeded")
    with contextlib.suppress(ConnectionError):
        assert client.at_end()


@pytest.mark.parametrize("piece", [b"x", b'"', b"1", b"}", b"\x00", b"'\\"])
def test_megabytes_of_rubbish_get_one_error(connect: Any, piece: bytes) -> None:
    client = connect()
    for _ in range(200):
        client.send(piece * (65536 // len(piece)))
    assert client.errors(b"") == [NOT_OBJECT]


def test_a_long_row_of_errors_ends_the_connection(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "FLUSH_S_MAX", WAIT_S_MAX)
    client = connect()
    client.send(b"}\n" * 5000)
    for _ in range(qmp.ERRORS_IN_A_ROW_MAX):
        assert client.read()["error"]["desc"] == NOT_OBJECT
    with contextlib.suppress(ConnectionError):
        assert client.at_end()


@pytest.mark.slow
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
    assert held_bytes(stream) < 2 << 20
    assert time.process_time() - started_s < WAIT_S_MAX


# The ends


def test_stop_answers_the_command_under_way(
    server: Server, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "COMMAND_GRACE_S", WAIT_S_MAX)
    monkeypatch.setattr(qmp, "STOP_S_MAX", WAIT_S_MAX)
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


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.lists(PIECES.map(b"".join) | st.binary(max_size=3000), min_size=1, max_size=5))
def test_garbage_harms_no_other_client(server: Server, chunks: list[bytes]) -> None:
    logging.getLogger("nbdmirror.qmp.server").setLevel(logging.CRITICAL)
    with contextlib.closing(Raw(server.path)) as good:
        with contextlib.closing(Raw(server.path)) as bad:
            with contextlib.suppress(ConnectionError):
                for chunk in chunks:
                    bad.send(chunk)
            assert good.ask({"execute": "echo", "id": 1}) == {"return": {}, "id": 1}
        assert good.ask({"execute": "echo", "id": 2}) == {"return": {}, "id": 2}
    logging.getLogger("nbdmirror.qmp.server").setLevel(logging.NOTSET)
