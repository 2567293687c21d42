"""NBD URIs: this module alone reads, checks and writes them.

libnbd gets the checked form (`NbdUri.exact`), not the user's text, so both mean the same server.
This module refuses URIs that libnbd accepts in part: libnbd takes a port modulo 65536, uses the
last one of a repeated parameter, and ignores unknown parameters.

A relative path in a URI is relative to the directory of the user who wrote it. `absolute` is for
the program that the user started there; otherwise (`parse`) a relative path is refused, since the
server has another directory.

Pure functions, for any thread.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote_to_bytes

from nbdmirror.errors import ConfigError
from nbdmirror.limits import PORT_MAX, whole_number
from nbdmirror.paths import absolute_path

DEFAULT_PORT = 10809
"""IANA's port, for a URI without one."""

URI_BYTES_MAX = 8192
"""Bound on a URI: an export's name has at most 4,096 bytes, and queries list all nodes' URIs."""

EXPORT_BYTES_MAX = 4096
"""The NBD specification's limit of a string."""

SOCKET_BYTES_MAX = 107
"""Longest path of a Unix socket; sockaddr_un has 108 bytes with the zero byte (unix(7))."""

SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")

_PARAMETERS = ("socket", "tls-certificates", "tls-psk-file", "tls-verify-peer")
_FILES = ("socket", "tls-certificates", "tls-psk-file")
_FORM = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(#.*)?", re.DOTALL)
_HOST = re.compile(r"\[(?P<six>[^\[\]]*)\]|(?P<name>[^\[\]:@]*)")
_OLD_FORM = re.compile(r"nbd:(?!//)(.*?)(?::exportname=(.*))?", re.DOTALL | re.IGNORECASE)
_ADVICE = "an NBD URI is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True, slots=True)
class NbdUri:
    """An export of a server, and how to reach it. All but `text` is decoded."""

    text: str
    """The user's text, for messages."""
    transport: str
    """tcp, unix or vsock."""
    is_tls: bool
    host: str = ""
    """A name or an address, without brackets; for vsock the number of a machine (CID)."""
    port: int = DEFAULT_PORT
    socket: str = ""
    export: str = ""
    user: str = ""
    certificates: str = ""
    psk_file: str = ""
    verifies_peer: bool = True

    @property
    def exact(self) -> str:
        """The URI, with everything ambiguous escaped."""
        scheme = ("nbds" if self.is_tls else "nbd") + (
            "" if self.transport == "tcp" else f"+{self.transport}"
        )
        authority = f"{_quote(self.user)}@" if self.user else ""
        if self.transport != "unix":
            host = f"[{_quote(self.host, ':')}]" if ":" in self.host else _quote(self.host)
            authority += f"{host}:{self.port}"
        paths = (self.socket, self.certificates, self.psk_file)
        query = [f"{key}={_quote(path, '/')}" for key, path in zip(_FILES, paths, strict=True)]
        query = [one for one in query if not one.endswith("=")]
        if not self.verifies_peer:
            query.append("tls-verify-peer=false")
        uri = f"{scheme}://{authority}/{_quote(self.export)}"
        return f"{uri}?{'&'.join(query)}" if query else uri


def is_uri(disk: str) -> bool:
    """Whether `disk` is an NBD URI, good or bad, and not a path."""
    scheme, separator, _ = disk.partition(":")
    return bool(separator) and scheme.lower().split("+")[0] in ("nbd", "nbds")


def parse(text: str) -> NbdUri:
    """Parse a URI. QEMU's older form, which management tools still send, is accepted as well:
    nbd:HOST:PORT[:exportname=NAME], nbd:unix:PATH[:exportname=NAME]. Raises ConfigError with one
    line that says what is allowed."""
    uri = _read(text)
    for path in (uri.socket, uri.certificates, uri.psk_file):
        if path and not os.path.isabs(path):
            raise ConfigError(
                f"{text}: '{path}' is a relative path, and the server's directory is another one: "
                f"write the absolute path"
            )
    return uri


def absolute(text: str) -> str:
    """The same URI with absolute paths; relative ones are relative to this process's directory.
    Raises ConfigError as `parse` does."""
    uri = _read(text)
    paths = [uri.socket, uri.certificates, uri.psk_file]
    if all(not path or os.path.isabs(path) for path in paths):
        return uri.text
    made = [path and absolute_path(path) for path in paths]
    uri = replace(uri, socket=made[0], certificates=made[1], psk_file=made[2])
    _check_socket(text, uri.socket)
    return uri.exact


def _read(text: str) -> NbdUri:
    if not text.isprintable():
        raise ConfigError(f"{text!r} is not an NBD URI: it has control characters")
    if len(os.fsencode(text)) > URI_BYTES_MAX:
        raise ConfigError(f"{text[:40]}...: an NBD URI has at most {URI_BYTES_MAX} bytes")
    if old := _OLD_FORM.fullmatch(text):
        return _old_form(text, *old.groups(default=""))
    form = _FORM.fullmatch(text)
    if form is None:
        raise ConfigError(
            f"'{text}' is not an NBD URI: {_ADVICE}; serve a file with qemu-nbd or nbdkit"
        )
    scheme, authority, path, query, fragment = form.groups(default="")
    if scheme.lower() not in SCHEMES:
        raise ConfigError(f"{text}: the scheme must be one of {', '.join(SCHEMES)}")
    if fragment:
        raise ConfigError(f"{text}: an NBD URI has no fragment; write a '#' in a name as %23")
    start, _, transport = scheme.lower().partition("+")
    transport = transport or "tcp"
    user, host, port = _authority(text, authority, transport)
    given = _parameters(text, query)
    return _checked(
        NbdUri(
            text=text,
            transport=transport,
            is_tls=start == "nbds",
            host=host,
            port=port,
            user=user,
            export=_decode(text, path.removeprefix("/"), "the export's name"),
            socket=given.get("socket", ""),
            certificates=given.get("tls-certificates", ""),
            psk_file=given.get("tls-psk-file", ""),
            verifies_peer=given.get("tls-verify-peer", "true").lower() in _TRUE,
        )
    )


def _checked(uri: NbdUri) -> NbdUri:
    """Check the parts of a URI together. Raises ConfigError."""
    text = uri.text
    if uri.transport == "unix" and not uri.socket:
        raise ConfigError(f"{text}: names no socket: {_ADVICE}")
    if uri.transport != "unix" and uri.socket:
        raise ConfigError(f"{text}: 'socket' is for nbd+unix:// and nbds+unix://")
    _check_socket(text, uri.socket)
    if len(uri.export.encode()) > EXPORT_BYTES_MAX:
        raise ConfigError(
            f"{text[:40]}...: the export's name has more than NBD's {EXPORT_BYTES_MAX} bytes"
        )
    if not uri.is_tls and (uri.certificates or uri.psk_file or not uri.verifies_peer):
        raise ConfigError(f"{text}: keys need TLS: use nbds:// or nbds+unix://")
    if uri.certificates and uri.psk_file:
        raise ConfigError(f"{text}: tls-certificates or tls-psk-file, not both")
    if uri.user and not uri.psk_file:
        raise ConfigError(f"{text}: a user name is for TLS with pre-shared keys (tls-psk-file)")
    return uri


def _check_socket(text: str, path: str) -> None:
    if len(os.fsencode(path)) > SOCKET_BYTES_MAX:
        raise ConfigError(f"{text}: a Unix socket's path has at most {SOCKET_BYTES_MAX} bytes")


def _old_form(text: str, address: str, export: str) -> NbdUri:
    if address.lower().startswith("unix:") and address[5:]:
        uri = NbdUri(text=text, transport="unix", is_tls=False, socket=address[5:], export=export)
    else:
        host, _, port = address.rpartition(":")
        if not host or not port:
            raise ConfigError(f"error parsing address '{address}' in '{text}': {_ADVICE}")
        host = _host(text, host)
        port_ = _port(text, port)
        uri = NbdUri(text=text, transport="tcp", is_tls=False, host=host, port=port_, export=export)
    return _checked(replace(uri, text=uri.exact))


def _authority(text: str, authority: str, transport: str) -> tuple[str, str, int]:
    user, at, address = authority.rpartition("@")
    if at and (not user or "@" in user or ":" in user):
        raise ConfigError(
            f"{text}: only a user name may stand before the '@', without a password; write ':' "
            f"and '@' in the name as %3A and %40"
        )
    user = _decode(text, user, "the user's name")
    if transport == "unix":
        if address:
            raise ConfigError(f"{text}: a Unix socket has no host '{address}': write three slashes")
        return user, "", DEFAULT_PORT
    port = DEFAULT_PORT
    bracket = address.rfind("]")
    if (colon := address.rfind(":")) > bracket and address.count(":", bracket + 1) == 1:
        port = _port(text, address[colon + 1 :], 2**31 - 1 if transport == "vsock" else PORT_MAX)
        address = address[:colon]
    if authority and not address:  # as of an unset variable; all of it may be left out
        raise ConfigError(f"{text}: has no host: write localhost, or the host's name")
    if transport == "vsock":
        if address and whole_number(address, 0, 2**32 - 1) is None:
            raise ConfigError(f"{text}: the host of a vsock must be a machine's number (CID)")
        return user, address or "2", port
    return user, _host(text, address), port


def _host(text: str, host: str) -> str:
    """The host without brackets. Without one it is this machine, as in libnbd."""
    form = _HOST.fullmatch(host)
    if form is None:
        raise ConfigError(
            f"{text}: '{host}' is not a host; write an IPv6 address in brackets: nbd://[::1]/"
        )
    if form["six"] is not None:
        host = _decode(text, form["six"], "the host")
        try:
            socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        except OSError as error:
            raise ConfigError(f"{text}: '[{host}]' is not an IPv6 address") from error
        return host
    host = _decode(text, host, "the host")
    if re.search(r"[\s/\\?#@\[\]:,]", host):
        raise ConfigError(f"{text}: '{host}' is not a host name or address")
    return host or "localhost"


def _port(text: str, port: str, most: int = PORT_MAX) -> int:
    if (number := whole_number(port, 1, most)) is None:
        raise ConfigError(f"{text}: the port '{port}' is not a number from 1 to {most}")
    return number


def _parameters(text: str, query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in query.split("&") if query else []:
        key, _, value = pair.partition("=")
        key = _decode(text, key, "a parameter")
        if key not in _PARAMETERS:
            allowed = ", ".join(_PARAMETERS)
            raise ConfigError(f"{text}: the parameter '{key}' is unknown; known are {allowed}")
        if key in found:
            raise ConfigError(f"{text}: the parameter '{key}' is given twice")
        found[key] = _decode(text, value, f"'{key}'", is_path=key in _FILES)
        if not found[key]:
            raise ConfigError(f"{text}: the parameter '{key}' has no value")
    if found.get("tls-verify-peer", "true").lower() not in _TRUE + _FALSE:
        raise ConfigError(f"{text}: tls-verify-peer is true or false")
    return found


def _decode(text: str, part: str, what: str, *, is_path: bool = False) -> str:
    """Decode percent escapes only: a plus sign stays. A path may have any bytes, as in
    os.fsdecode."""
    if re.search("%(?![0-9A-Fa-f]{2})", part):
        raise ConfigError(f"{text}: write a '%' in {what} as %25")
    data = unquote_to_bytes(part)
    if b"\0" in data:
        raise ConfigError(f"{text}: {what} has a zero byte")
    try:
        return os.fsdecode(data) if is_path else data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{text}: {what} is not UTF-8") from error


def _quote(part: str, safe: str = "") -> str:
    return quote(os.fsencode(part), safe=safe)
