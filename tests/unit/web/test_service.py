"""The HTTP server: what is where, and that no client keeps others from being served."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import time

import pytest
from support.madeservers import JOB, Made, Serving, disk, status
from support.waiting import WAIT_S_MAX, wait_until

from nbdmirror.errors import Error
from nbdmirror.web import live, service
from nbdmirror.web.host import NoAnswer
from nbdmirror.web.live import SILENCE_S_MAX


def test_what_is_where(serving: Serving) -> None:
    first, second = serving.json("/status")
    assert 0 <= first.pop("age-s") < WAIT_S_MAX
    assert first == {"qmp": "/a", **status(disk("vda", JOB))}
    assert second == {"qmp": "/b", "error": "no server at /b"}
    assert serving.json("/healthz") == {
        "status": "ok",
        "servers": 2,
        "not-answering": {"/b": "no server at /b"},
    }
    assert 'nbdmirror_server_up{server="/a"} 1.0' in serving.get("/metrics")[1]
    assert serving.get("/nothing")[0] == 404


@pytest.mark.parametrize("path", ["/metrics", "/status", "/healthz"])
def test_nothing_can_be_changed(serving: Serving, path: str) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert serving.get(path, method)[0] == 405
    assert serving.get(path, "HEAD") == (200, "")


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [
        ("localhost", True),
        ("LOCALHOST:10810", True),
        ("127.0.0.1:80", True),
        ("[::1]:10810", True),
        ("192.0.2.1", True),  # by a forwarded port; no name that can be given another address
        ("example.com", False),
        ("localhost.example.com:10810", False),
        ("127.0.0.1.example.com", False),
        ("[::1].example.com", False),
        ("user@localhost", False),
    ],
)
def test_another_name_for_this_machine_is_refused(
    serving: Serving, name: str, is_ours: bool
) -> None:
    code, text = serving.get("/status", Host=name)
    assert code == (200 if is_ours else 421)
    assert is_ours or "vda" not in text


def test_a_service_for_others_has_names() -> None:
    with Serving({}, is_loopback=False) as one:
        assert one.get("/status", Host="monitoring.example.com")[0] == 200


@pytest.mark.parametrize(
    "says",
    [None, [], 7, {"disks": {"a": 1}}, {"disks": [1, None, {}]}, Error("a bug"), {"x": 1e999}],
)
def test_a_strange_answer_is_that_servers_alone(serving: Serving, says: object) -> None:
    strange = serving.servers["/c"] = Made(says)
    wait_until(lambda: strange.asked > 1, "it was asked")
    for path in ("/status", "/healthz", "/metrics"):
        code, text = serving.get(path)
        assert (code, "/a" in text or path == "/healthz") == (200, True)
        assert "NaN" not in text and "Infinity" not in text


# Clients


def test_connections_that_ask_nothing_keep_nobody_out(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times as many as there may be: some that say nothing, some that stop in the middle of a
    request, some that do not read the answer."""
    monkeypatch.setattr(service, "CONNECTION_S_MAX", 3600.0)
    said = (
        b"",
        b"GET /metrics HTTP/1.1\r\nHost: lo",
        b"GET /status HTTP/1.1\r\nHost: [::1]\r\n\r\n",
    )
    clients = []
    with contextlib.ExitStack() as stack:
        for number in range(3 * service.CONNECTIONS_MAX):
            clients.append(stack.enter_context(serving.connection()))
            clients[-1].sendall(said[number % 3])
            if number % 16 == 0:
                assert serving.get("/metrics")[0] == 200
        assert serving.get("/metrics")[0] == 200
        silent = [client for number, client in enumerate(clients) if number % 3 != 2]
        assert len(silent) > service.CONNECTIONS_MAX

        def are_bounded() -> bool:
            return sum(map(is_open, silent)) <= service.CONNECTIONS_MAX

        wait_until(are_bounded, "the oldest were closed")
        assert is_open(silent[-1])


def is_open(client: socket.socket) -> bool:
    """Of a connection on which nothing was answered."""
    client.setblocking(False)
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def test_a_connection_ends(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then does not lengthen its time."""
    monkeypatch.setattr(service, "CONNECTION_S_MAX", 0.3)
    with serving.connection() as client, contextlib.suppress(OSError):
        client.settimeout(0.02)
        deadline_s = time.monotonic() + WAIT_S_MAX
        while time.monotonic() < deadline_s:
            client.sendall(b"G")
            with contextlib.suppress(TimeoutError):
                assert client.recv(1) == b""
                return
        raise AssertionError("it goes on")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS handshake
        b"NBDMAGIC" * 8 + b"\r\n\r\n",
        b"GET /" + b"x" * (1 << 20),
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * (1 << 16),
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /%ff%00%0a HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET //[ HTTP/1.1\r\nHost: [\r\n\r\n",
        b"GET http://[/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nHost: \r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100,
    ],
)
def test_a_request_that_is_none(
    serving: Serving, sent: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """It gets an answer, or is hung up on; nothing is logged for it."""
    with serving.connection() as client, contextlib.suppress(OSError):
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        while client.recv(1 << 16):
            pass
    assert serving.get("/healthz")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_every_answer_has_its_headers(serving: Serving) -> None:
    for path in ("/status", "/nothing"):
        with serving.connection() as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            answer = b"".join(iter(lambda: client.recv(1 << 16), b"")).decode().lower()
        for line in (
            "cache-control: no-store",
            "content-security-policy: default-src 'none'",
            "x-content-type-options: nosniff",
            "connection: close",
        ):
            assert f"\n{line}" in answer
        assert "\nserver:" not in answer


def test_the_status_is_json_of_any_name(serving: Serving) -> None:
    name = "\udcff</script>\n"
    serving.servers[name] = Made(status(disk(name)))
    wait_until(lambda: len(serving.json("/status")) == 3, "it was asked")
    found = {one["qmp"] for one in json.loads(serving.get("/status")[1])}
    assert "\\udcff</script>\n" in found


# Pages that follow what happens


class Listener:
    """A page's connection to /events."""

    def __init__(self, serving: Serving, *lines: str) -> None:
        self.socket = serving.connection()
        self._file = self.socket.makefile("rb")
        head = ["GET /events HTTP/1.1", "Host: localhost", *lines, "", ""]
        self.socket.sendall("\r\n".join(head).encode())
        self.code = int(self._file.readline().split()[1])

    def next(self, kind: str) -> str:
        """The next message of this kind."""
        while self._file.readline().strip() != f"event: {kind}".encode():
            pass
        lines = [self._file.readline(), self._file.readline()]
        assert lines[0].startswith(b"id: ")
        return str(json.loads(lines[1].removeprefix(b"data: ")))

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "REFRESH_S", 0.02)


@pytest.mark.usefixtures("quick")
def test_a_page_gets_what_happens(serving: Serving) -> None:
    with contextlib.closing(Listener(serving)) as page:
        assert "vda" in page.next("servers")
        serving.servers["/a"].says = status(disk("vda\r\nevent: x\r\n\r\n", JOB))
        while "event: x" not in page.next("servers"):
            pass
        serving.servers["/a"].unread.append("JOB_STATUS_CHANGE status=paused")
        assert "status=paused" in page.next("events")
        serving.servers["/a"].says = NoAnswer("the server is gone")
        assert "the server is gone" in page.next("events")


@pytest.mark.usefixtures("quick")
def test_a_page_gets_a_sign_of_life_while_nothing_happens(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while servers are asked again and again, and none answers: nothing changes then."""
    monkeypatch.setattr(live, "SILENCE_S_MAX", 0.2)
    assert 1000 * SILENCE_S_MAX * 2 < live.SILENT_MS
    serving.servers["/a"].says = NoAnswer("no server at /a")
    with contextlib.closing(Listener(serving)) as page:
        while "no server at /a" not in page.next("servers"):
            pass
        before = serving.servers["/b"].asked
        while serving.servers["/b"].asked < before + 3:
            assert page.next("alive") == ""


@pytest.mark.usefixtures("quick")
def test_a_page_that_comes_back_gets_what_is_new(serving: Serving) -> None:
    serving.servers["/a"].unread += ["FIRST", "SECOND"]
    wait_until(lambda: "SECOND" in serving.get("/")[1], "they are on the page")
    numbers = re.findall(r'data-number="(\d+)"', serving.get("/")[1])
    with contextlib.closing(Listener(serving, f"Last-Event-ID: {numbers[1]}")) as page:
        text = page.next("events")
        assert "SECOND" in text and "FIRST" not in text
    for strange in ("x", "-1", "9" * 400):
        with contextlib.closing(Listener(serving, f"Last-Event-ID: {strange}")) as page:
            assert "FIRST" in page.next("events")


def test_pages_are_bounded(serving: Serving) -> None:
    """One that goes gives its place back; those that stay keep no scrape out."""
    with contextlib.ExitStack() as stack:
        pages = [Listener(serving) for _ in range(live.LISTENERS_MAX)]
        for page in pages:
            stack.callback(page.close)
            assert page.code == 200
            page.next("servers")
        refused = Listener(serving)
        stack.callback(refused.close)
        assert refused.code == 503
        assert serving.get("/metrics")[0] == 200
        pages[3].close()

        def has_place() -> bool:
            another = Listener(serving)
            stack.callback(another.close)
            return another.code == 200

        wait_until(has_place, "there is a place again")


@pytest.mark.usefixtures("quick")
def test_a_page_is_no_connection_that_ends_soon(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "CONNECTION_S_MAX", 0.1)
    with contextlib.closing(Listener(serving)) as page:
        for number in range(5):
            serving.servers["/a"].unread.append(f"NEWS{number}")
            while f"NEWS{number}" not in page.next("events"):
                pass


@pytest.mark.usefixtures("quick")
def test_a_page_that_does_not_read_is_hung_up_on(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "CONNECTION_S_MAX", 0.1)
    monkeypatch.setattr(live, "LISTENERS_MAX", 1)
    server, number = serving.servers["/a"], itertools.count()
    with serving.connection() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.recv(16)
        with contextlib.closing(Listener(serving)) as too_many:
            assert too_many.code != 200

        def has_place() -> bool:
            server.says = status(disk("x" * 300_000 + str(next(number))))
            with contextlib.closing(Listener(serving)) as another:
                return another.code == 200

        wait_until(has_place, "its place is free")
    server.says = status()
    assert serving.get("/healthz")[0] == 200


@pytest.mark.usefixtures("quick")
def test_a_page_asks_again_now_and_then(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LISTENING_S_MAX", 0.2)
    with contextlib.closing(Listener(serving)) as page:
        page.socket.settimeout(WAIT_S_MAX)
        page.next("servers")
        while page.socket.recv(1 << 16):
            pass
    assert serving.get("/")[0] == 200
