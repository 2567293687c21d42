"""QMP over real Unix sockets: the socket's file, and what QEMU says word by word."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.waiting import wait_until
from unit.qmp.qmpparts import NOT_OBJECT, VERSION, WAIT_S_MAX, Server, first_client

from nbdmirror import unix_sockets as sockets
from nbdmirror.errors import ConfigError

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
    (b"5{}", [NOT_OBJECT, "QMP input lacks member 'execute'"]),
    (b"{}", ["QMP input lacks member 'execute'"]),
    (b'{"x":1}', ["QMP input member 'x' is unexpected"]),
    (b'{"execute":"e","exec-oob":"e"}', ["QMP input member 'exec-oob' is unexpected"]),
    (b'{"execute":null}', ["QMP input member 'execute' must be a string"]),
    (b'{"execute":"e","arguments":null}', ["QMP input member 'arguments' must be an object"]),
]

RUBBISH = [
    b'5 "x" null true',
    b"}",
    b"{]",
    b"[}",
    b"{,}",
    b'{"a":1,}',
    b"[1,]",
    b'{"execute" "x"}',
    b"[1 2]",
    b'{"a":1 "b":2}',
    b"{5:1}",
    b"foo ",
    b"@@@@",
    b'@ @ "x" 5',
    b"01 ",
    b".5 ",
    b"\x00\x00\x00",
    b"\xff\xfe\xfd",
    b'{"execute":"x\x00y"}',
    b'{"execute":"\xff"}',
    b'{"execute":"abc',
    b'["\xed\xa0\x80"]',
    b'["\\q"]',
    b'["\\u00zz"]',
    b'["\\ud800"]',
    b'{"execute":"foo" @,"id":1}',
    b'{"execute":"e","execute":"e"}',
]
"""What is not JSON. QEMU's texts are others, and some of these are several errors to it."""


@pytest.mark.parametrize(("data", "texts"), TABLE)
def test_texts_are_qemus(connect: Any, data: bytes, texts: list[str]) -> None:
    assert connect().errors(data) == texts


@pytest.mark.parametrize("data", RUBBISH)
def test_rubbish_gets_one_error_and_keeps_its_connection(connect: Any, data: bytes) -> None:
    client = connect()
    for _ in range(3):
        (answer,) = client.answers(data)
        assert list(answer) == ["error"]
        assert answer["error"]["class"] == "GenericError"


def test_the_table_is_what_qemu_says(tmp_path: Path) -> None:
    """And what is rubbish here is rubbish there."""
    daemon = shutil.which("qemu-storage-daemon")
    if not daemon:
        pytest.skip("qemu-storage-daemon is not installed: nothing to compare with")
    path = str(tmp_path / "qemu")
    chardev = f"socket,id=c,path={path},server=on,wait=off"
    process = subprocess.Popen([daemon, "--chardev", chardev, "--monitor", "chardev=c"])
    try:
        client = wait_until(lambda: first_client(path), "QEMU's monitor answers", WAIT_S_MAX)
        with contextlib.closing(client):
            for data, texts in TABLE:
                assert (data, client.errors(data)) == (data, texts)
            for data in RUBBISH:
                assert client.errors(data), data
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
