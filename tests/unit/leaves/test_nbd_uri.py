"""NBD URIs: what each part means, what is refused and how that is said, and that libnbd is given
what was read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdmirror.errors import ConfigError
from nbdmirror.nbd_uri import NbdUri, absolute, is_uri, parse

GOOD: list[tuple[str, dict[str, object]]] = [
    ("nbd://host", {"transport": "tcp", "host": "host", "port": 10809, "export": ""}),
    ("nbd://", {"host": "localhost"}),
    ("nbd:///vda", {"host": "localhost", "export": "vda"}),
    ("NBD://Host:0080/", {"host": "Host", "port": 80}),
    ("nbd://[::1]:5/a%20b", {"host": "::1", "port": 5, "export": "a b"}),
    ("nbd://[fe80::1%25eth0]/", {"host": "fe80::1%eth0"}),
    ("nbd://127.0.0.1/a+b", {"export": "a+b"}),
    ("nbd://h/a%2Fb%2fc//d", {"export": "a/b/c//d"}),
    ("nbd://h//a", {"export": "/a"}),
    ("nbd://h/%E2%82%AC%25%23%3f", {"export": "€%#?"}),
    ("nbd://h/with a space", {"export": "with a space"}),
    ("nbd+unix:///?socket=/run/a+b", {"transport": "unix", "socket": "/run/a+b"}),
    ("nbd+unix:///x?socket=/run/a%26b;c=d", {"socket": "/run/a&b;c=d", "export": "x"}),
    ("nbd+unix:///?socket=/run/%ff", {"socket": os.fsdecode(b"/run/\xff")}),
    ("nbd+vsock://3:2000000000/x", {"transport": "vsock", "host": "3", "port": 2_000_000_000}),
    ("nbds://u%40h@host/?tls-psk-file=/keys.psk", {"user": "u@h", "psk_file": "/keys.psk"}),
    ("nbds://h/?tls-certificates=/pki&tls-verify-peer=no", {"verifies_peer": False}),
    ("nbd:host:10", {"host": "host", "port": 10}),
    ("nbd:[::1]:10:exportname=a b", {"host": "::1", "export": "a b"}),
    ("nbd:unix:/run/s:exportname=x", {"transport": "unix", "socket": "/run/s", "export": "x"}),
]


@pytest.mark.parametrize(("text", "parts"), GOOD, ids=[text for text, _ in GOOD])
def test_what_it_means(text: str, parts: dict[str, object]) -> None:
    uri = parse(text)
    for name, value in parts.items():
        assert getattr(uri, name) == value
    again = parse(uri.exact)
    for name in NbdUri.__dataclass_fields__:
        assert name == "text" or getattr(again, name) == getattr(uri, name), uri.exact
    assert uri.exact.isascii()
    assert is_uri(text)
    assert absolute(text) == uri.text, "nothing in it is relative"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("disk.img", "not an NBD URI: an NBD URI is nbd://"),
        ("/dev/sda", "not an NBD URI"),
        ("http://host/", "the scheme must be one of nbd, nbds, nbd+unix"),
        ("nbd+ssh://host/", "the scheme must be one of"),
        ("nbd:host", "error parsing address"),
        ("nbd:unix:", "error parsing address"),
        ("nbd://host:99999/", "the port '99999' is not a number from 1 to 65535"),
        ("nbd:host:65536", "the port '65536' is not a number from 1 to 65535"),
        ("nbd://host:0/", "from 1 to 65535"),
        ("nbd://host:/", "the port ''"),
        ("nbd://host:+80/", "the port '+80'"),
        ("nbd://host:http/", "the port 'http'"),
        ("nbd://host:8\u0660/", "the port"),
        ("nbd+vsock://2:4294967297/", "the port"),
        ("nbd+vsock://host/", "a machine's number"),
        ("nbd://:10809/x", "has no host: write localhost"),
        ("nbds://user@/x", "has no host: write localhost"),
        ("nbd+vsock://:10809/", "has no host"),
        ("nbd://::1/", "write an IPv6 address in brackets"),
        ("nbd://[::1/", "is not a host"),
        ("nbd://[::g]/", "is not an IPv6 address"),
        ("nbd://a b/", "is not a host"),
        ("nbd://a,b/", "is not a host"),
        ("nbd://host/x#y", "write a '#' in a name as %23"),
        ("nbd://host/%", "write a '%' in the export's name as %25"),
        ("nbd://host/%zz", "as %25"),
        ("nbd://host/%00", "zero byte"),
        ("nbd://host/%ff", "is not UTF-8"),
        ("nbd://host/a\nb", "control characters"),
        (f"nbd://host/{'x' * 4097}", "more than NBD's 4096 bytes"),
        (f"nbd://host/{'%E2%82%AC' * 1000}", "at most 8192 bytes"),
        ("nbd+unix:///", "names no socket"),
        ("nbd+unix:///?socket=", "'socket' has no value"),
        ("nbd+unix://host/?socket=/s", "has no host 'host'"),
        ("nbd+unix://:80/?socket=/s", "has no host"),
        (f"nbd+unix:///?socket=/{'x' * 107}", "at most 107 bytes"),
        ("nbd+unix:///?socket=/a&socket=/b", "'socket' is given twice"),
        ("nbd+unix:///?sokcet=/a", "'sokcet' is unknown; known are socket, tls-certificates"),
        ("nbd+unix:///?socket=/a&", "parameter '' is unknown"),
        ("nbd://host/?socket=/a", "is for nbd+unix://"),
        ("nbd://host/?tls-psk-file=/a", "keys need TLS"),
        ("nbd://host/?tls-verify-peer=false", "keys need TLS"),
        ("nbds://host/?tls-psk-file=/a&tls-certificates=/b", "not both"),
        ("nbds://host/?tls-verify-peer=maybe", "true or false"),
        ("nbd://user@host/", "a user name is for TLS with pre-shared keys"),
        ("nbds://user:secret@host/?tls-psk-file=/a", "without a password"),
        ("nbds://a@b@host/?tls-psk-file=/a", "%40"),
        ("nbds://@host/", "only a user name"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    for read in (parse, absolute):
        with pytest.raises(ConfigError) as caught:
            read(text)
        assert words in str(caught.value)
        assert str(caught.value).isprintable(), "one line"


@pytest.mark.parametrize(
    "text",
    [
        "nbd+unix:///?socket=s",
        "nbd+unix:///x?socket=./s",
        "nbd+unix:///x?socket=../{here}/s",
        "nbd:unix:s",
        "nbds://host/?tls-certificates=s",
        "nbds://host/?tls-psk-file=s",
        "nbds+unix:///?socket=/t&tls-psk-file=s",
    ],
)
def test_a_relative_path_is_the_writers(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the program that he started it is made absolute; elsewhere it means nothing."""
    text = text.format(here=tmp_path.name)
    with pytest.raises(ConfigError, match="write the absolute path"):
        parse(text)
    monkeypatch.chdir(tmp_path)
    uri = parse(absolute(text))
    assert str(tmp_path / "s") in (uri.socket, uri.certificates, uri.psk_file)


def test_a_directory_that_makes_a_socket_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        absolute("nbd+unix:///?socket=s")


@pytest.mark.parametrize(
    ("disk", "is_one"),
    [("nbd://h", True), ("NBDS://h", True), ("nbd:h:1", True), ("nbd+x:", True)]
    + [(path, False) for path in ("/a", "nbd", "./nbd:x", "nbdx:y", "a/nbd://x")],
)
def test_a_disk_is_a_uri_or_a_path(disk: str, is_one: bool) -> None:
    assert is_uri(disk) == is_one
