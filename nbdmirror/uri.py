"""NBD URIs from QMP's structured addresses, and whether two are the same. To connect, libnbd reads
them."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from nbdmirror.errors import CommandError
from nbdmirror.tls import AUTHORITY, PSK_NAME

DEFAULT_PORT = 10809
"""IANA's, where a URI names none."""


def is_uri(disk: str) -> bool:
    """Whether a disk is named by an NBD URI, not by a path."""
    scheme, separator, _ = disk.partition(":")
    return bool(separator) and scheme.split("+")[0] in ("nbd", "nbds")


def target_uri(target: str) -> str:
    """The URI of a drive-mirror's target. QEMU's older form, which management tools still send, is
    taken as well: nbd:HOST:PORT[:exportname=NAME], nbd:unix:PATH[:exportname=NAME]."""
    if not target.startswith("nbd:") or target.startswith("nbd://"):
        return target
    address, _, export = target.removeprefix("nbd:").partition(":exportname=")
    if address.startswith("unix:"):
        server = {"type": "unix", "path": address.removeprefix("unix:")}
    else:
        host, _, port = address.rpartition(":")
        if not host or not port:
            raise CommandError(f"error parsing address '{address}' in '{target}'")
        server = {"type": "inet", "host": host.strip("[]"), "port": port}
    return nbd_uri({"server": server, "export": export})


def is_same_place(one: str, other: str) -> bool:
    """Whether two paths, or two NBD URIs, name the same by themselves: nothing is asked."""
    if not (is_uri(one) and is_uri(other)):
        return one == other
    return one == other or _place(one) == _place(other)


def _place(uri: str) -> tuple[str, str]:
    """Where the server is, and which export. With TLS or without, it is the same."""
    try:
        parts = urlsplit(uri)
        export = unquote(parts.path.removeprefix("/"))
        if parts.scheme.endswith("+unix"):
            return os.path.abspath(parse_qs(parts.query)["socket"][0]), export
        return f"{parts.hostname}:{parts.port or DEFAULT_PORT}", export
    except (ValueError, KeyError):
        return uri, ""


def nbd_uri(options: dict[str, Any]) -> str:
    """The URI of a checked BlockdevOptionsNbd. `tls-creds` is a path: a directory of certificates,
    or a file of pre-shared keys, or a directory with nothing but that, as QEMU has it."""
    query = {}
    scheme, user = "nbd", quote(options.get("x-nbdmirror-tls-username", ""), safe="")
    if creds := options.get("tls-creds"):
        if not os.path.exists(creds):
            raise CommandError(f"No TLS credentials with id '{creds}': it is the path of them here")
        scheme = "nbds"
        psk_file = os.path.join(creds, PSK_NAME)
        if os.path.exists(psk_file) and not os.path.exists(os.path.join(creds, AUTHORITY)):
            creds = psk_file
        query["tls-certificates" if os.path.isdir(creds) else "tls-psk-file"] = creds
    elif user:
        raise CommandError("Parameter 'x-nbdmirror-tls-username' needs 'tls-creds'")
    user += "@" if user else ""
    server, export = options["server"], quote(options.get("export", ""), safe="")
    if server["type"] == "unix":
        query["socket"] = server["path"]
        base = f"{scheme}+unix://{user}/{export}"
    else:
        if not server["host"] or not server["port"].isdecimal():
            address = f"{server['host']}:{server['port']}"
            raise CommandError(f"address resolution failed for {address}: a host and a number")
        host = f"[{server['host']}]" if ":" in server["host"] else server["host"]
        base = f"{scheme}://{user}{host}:{server['port']}/{export}"
    return base + ("?" + urlencode(query, safe="/", quote_via=quote) if query else "")
