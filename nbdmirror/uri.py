"""NBD URIs from QMP's structured addresses. The reading of URIs is libnbd's."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import quote, urlencode

from nbdmirror.errors import CommandError


def is_uri(disk: str) -> bool:
    """Whether a disk is named by an NBD URI, not by a path."""
    scheme, separator, _ = disk.partition(":")
    return bool(separator) and scheme.split("+")[0] in ("nbd", "nbds")


def nbd_uri(options: dict[str, Any]) -> str:
    """The URI of a checked BlockdevOptionsNbd. `tls-creds` is a path: a directory of certificates,
    or a file of pre-shared keys."""
    query = {}
    scheme = "nbd"
    if creds := options.get("tls-creds"):
        if not os.path.exists(creds):
            raise CommandError(f"No TLS credentials with id '{creds}': it is the path of them here")
        scheme = "nbds"
        query["tls-certificates" if os.path.isdir(creds) else "tls-psk-file"] = creds
    server, export = options["server"], quote(options.get("export", ""), safe="")
    if server["type"] == "unix":
        query["socket"] = server["path"]
        base = f"{scheme}+unix:///{export}"
    else:
        host = f"[{server['host']}]" if ":" in server["host"] else server["host"]
        base = f"{scheme}://{host}:{server['port']}/{export}"
    return base + ("?" + urlencode(query, safe="/", quote_via=quote) if query else "")
