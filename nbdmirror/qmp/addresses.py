"""QMP's structured addresses of NBD exports, as URIs."""

from __future__ import annotations

import os
from typing import Any

from nbdmirror.errors import CommandError, ConfigError
from nbdmirror.limits import PORT_MAX, whole_number
from nbdmirror.nbd_uri import NbdUri, parse
from nbdmirror.nbdclient.tls import AUTHORITY, PSK_NAME


def target_uri(target: str) -> str:
    """The URI of a drive-mirror's target. Raises CommandError."""
    try:
        return parse(target).text
    except ConfigError as error:
        raise CommandError(str(error)) from error


def nbd_uri(
    server: dict[str, Any], export: str, tls_creds: str | None, tls_username: str | None
) -> str:
    """The URI of a checked BlockdevOptionsNbd. `tls-creds` is a path: a directory of certificates,
    a file of pre-shared keys, or a directory with only that file, as in QEMU. Raises
    CommandError."""
    for name, value in (("tls-creds", tls_creds), ("x-nbdmirror-tls-username", tls_username)):
        if value == "":
            raise CommandError(f"Parameter '{name}' is empty")
    creds, user = tls_creds or "", tls_username or ""
    certificates = psk_file = ""
    if creds:
        if not os.path.isabs(creds):
            raise CommandError(f"Parameter 'tls-creds' expects an absolute path, not '{creds}'")
        if not os.path.exists(creds):
            raise CommandError(f"No TLS credentials with id '{creds}': the path does not exist")
        psk_file = os.path.join(creds, PSK_NAME)
        if os.path.isdir(creds) and (
            os.path.exists(os.path.join(creds, AUTHORITY)) or not os.path.exists(psk_file)
        ):
            certificates, psk_file = creds, ""
        elif not os.path.isdir(creds):
            psk_file = creds
    elif user:
        raise CommandError("Parameter 'x-nbdmirror-tls-username' needs 'tls-creds'")
    is_unix = server["type"] == "unix"
    if is_unix and not os.path.isabs(server["path"]):
        raise CommandError(
            f"Parameter 'server.path' expects an absolute path, not '{server['path']}'"
        )
    port = "" if is_unix else server["port"]
    if not is_unix and not (server["host"] and whole_number(port, 1, PORT_MAX)):
        address = f"{server['host']}:{port}"
        raise CommandError(
            f"address resolution failed for {address}: a host and a number from 1 to {PORT_MAX}"
        )
    uri = NbdUri(
        text="",
        transport="unix" if is_unix else "tcp",
        is_tls=bool(creds),
        host=server.get("host", "").strip("[]"),
        port=int(port or 0),
        socket=server.get("path", ""),
        export=export,
        user=user,
        certificates=certificates,
        psk_file=psk_file,
    )
    return target_uri(uri.exact)
