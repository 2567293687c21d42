"""TLS: which keys a connection uses, whether they can be used, and why a handshake failed.

libnbd (towards targets and NBD sources) and nbdkit (towards guests) do TLS, both with GnuTLS. Their
error messages are not enough to solve a problem. libnbd before 1.18.5 and 1.20.3 (CVE-2024-7383)
does not verify a server in two cases: if it finds no authority's certificate, and if it knows no
host name, as on a Unix socket. This module refuses these cases. It only reads files and, in
`explain`, opens one connection. For any thread.
"""

from __future__ import annotations

import os
import socket
import ssl
import stat
import struct
import time
from dataclasses import dataclass

from nbdmirror.errors import ConfigError, Unreachable
from nbdmirror.nbd_uri import parse
from nbdmirror.resolver import connection_to

AUTHORITY = "ca-cert.pem"
PSK_NAME = "keys.psk"
"""QEMU's name for the file of pre-shared keys in a directory."""

_MAGIC, _OPTION_MAGIC, _REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_FIXED_NEWSTYLE, _STARTTLS, _ACK = 1, 5, 1

# X509_V_ERR_... of OpenSSL's x509_vfy.h.
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_AUTHORITIES = (2, 18, 19, 20, 21)
_WRONG_NAMES = (62, 64)


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """A client's keys: a directory of certificates ("" for the system's authorities), or a
    pre-shared key."""

    address: tuple[str, int] | str
    certificates: str = ""
    psk_file: str = ""
    user: str = ""

    @property
    def host(self) -> str:
        """The host name or address to verify; "" for a Unix socket."""
        return self.address[0] if isinstance(self.address, tuple) else ""


def client_keys(uri: str, libnbd_version: str) -> ClientKeys | None:
    """The keys of an NBD URI; None without TLS. Raises ConfigError if the keys cannot be used, or
    if this libnbd would not verify the server."""
    where = parse(uri)
    if not where.is_tls:
        return None
    address = where.socket or (where.host, where.port)
    if psk_file := where.psk_file:
        return ClientKeys(address, psk_file=psk_file, user=_user(psk_file, where.user))
    certificates = where.certificates or _default_certificates()
    if certificates:
        _check_certificates(certificates, "client")
    if not _verifies_always(libnbd_version) and where.verifies_peer:
        if not certificates:
            raise ConfigError(
                f"{uri}: libnbd {libnbd_version} does not verify the server without keys: add "
                f"?tls-certificates=DIRECTORY or ?tls-psk-file=FILE"
            )
        if where.transport == "unix":
            raise ConfigError(
                f"{uri}: libnbd {libnbd_version} does not verify the certificate of a server on a "
                f"Unix socket: use pre-shared keys there (?tls-psk-file=FILE), or TCP"
            )
    return ClientKeys(address, certificates=certificates)


def check_server_keys(*, certificates: str = "", psk: str = "") -> list[str]:
    """Warnings about the keys of a server that will cause problems for guests. Raises ConfigError
    if the keys cannot be used at all: nbdkit with --tls=on would continue in plain text."""
    if psk:
        _users(psk)
        return exposed(psk)
    _check_certificates(certificates, "server")
    certificate, key, authority = (
        os.path.join(certificates, name)
        for name in ("server-cert.pem", "server-key.pem", AUTHORITY)
    )
    problem = _problem(certificate, key, authority, is_server=True)
    return [*exposed(certificates), *([f"{certificate}: {problem}"] if problem else [])]


def exposed_keys(uri: str) -> list[str]:
    """`exposed` for the keys that an NBD URI names."""
    where = parse(uri)
    paths = (where.psk_file, where.certificates)
    return [warning for path in paths if path for warning in exposed(path)]


def exposed(path: str) -> list[str]:
    """Warnings about secrets at `path`, a file or a directory, that other users can read."""
    secrets = [path]
    if os.path.isdir(path):
        names = ("server-key.pem", "client-key.pem", "ca-key.pem", PSK_NAME)
        secrets = [os.path.join(path, name) for name in names]
    found = []
    for secret in secrets:
        try:
            mode = os.stat(secret).st_mode
        except OSError:
            continue
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            found.append(f"{secret}: other users can read this key; do: chmod 600 {secret}")
    return found


def explain(keys: ClientKeys | None, reason: str, timeout_s: float) -> str:
    """libnbd's `reason` for a failed connection, as a message that says what to do. `timeout_s`:
    for a check of the server's certificate."""
    if "server requires TLS" in reason:
        return "the server demands TLS: use nbds:// (over QMP: tls-creds), and keys"
    if keys is None:
        return reason
    if "server refused TLS" in reason or "handle TLS setting is 'require'" in reason:
        return "the server offers no TLS; without it use nbd:// (over QMP: no tls-creds)"
    # A server that does not accept a client closes; the client may see that first.
    if "gnutls_" not in reason and "closed socket unexpectedly" not in reason:
        return reason
    if keys.psk_file:
        text = (
            f"TLS: the server does not accept user '{keys.user}' with the key in {keys.psk_file}: "
            f"it has another key for that user, does not know the user, or requires certificates"
        )
    elif "certificate verification" in reason:
        text = f"TLS: the server's certificate is not accepted: {_look(keys, timeout_s)}"
    else:
        text = f"TLS: the server does not accept this client: {_own_problem(keys)}"
    return f"{text} ({reason})"


# Files.


def _default_certificates() -> str:
    """The directory in which libnbd looks for keys if the URI names none; "" if there is none."""
    if os.geteuid() == 0:
        places = ["/etc/pki/libnbd"]
    else:
        home = os.environ.get("HOME", "")
        places = [os.path.join(home, ".pki/libnbd"), os.path.join(home, ".config/pki/libnbd")]
    return next((p for p in places if os.path.exists(os.path.join(p, AUTHORITY))), "")


def _check_certificates(directory: str, side: str) -> None:
    """Raise ConfigError unless the files that `side` needs exist and can be read."""
    _check_absolute(directory)
    if not os.path.isdir(directory):
        what = "is not a directory" if os.path.exists(directory) else "no such directory"
        raise ConfigError(f"{directory}: {what}; it should have {AUTHORITY} and {side}-cert.pem")
    pair = [f"{side}-cert.pem", f"{side}-key.pem"]
    there = [os.path.exists(os.path.join(directory, name)) for name in pair]
    needed = [AUTHORITY, *(pair if side == "server" or any(there) else [])]
    for name in needed:
        _read(os.path.join(directory, name))


def _check_absolute(path: str) -> None:
    if not os.path.isabs(path):
        raise ConfigError(f"{path}: the path of keys must be absolute, since the server reads them")


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _users(psk_file: str) -> list[str]:
    """The names in a file of pre-shared keys. Raises ConfigError."""
    _check_absolute(psk_file)
    lines = [line for line in _read(psk_file).splitlines() if line and line[0] != "#"]
    users = []
    for line in lines:
        user, colon, key = line.rpartition(":")
        try:
            is_good = bool(user and colon and bytes.fromhex(key))
        except ValueError:
            is_good = False
        if not is_good:  # the line itself may be a secret
            raise ConfigError(f"{psk_file}: its lines should be USER:KEY, as psktool makes them")
        users.append(user)
    if not users:
        raise ConfigError(f"{psk_file}: has no keys")
    return users


def _user(psk_file: str, wanted: str) -> str:
    """The user name for the handshake: `wanted`, or the only user in the file."""
    users = _users(psk_file)
    user = wanted or users[0]
    if user not in users:
        raise ConfigError(f"{psk_file}: has no key of user '{user}'")
    if not wanted and len(users) > 1:
        raise ConfigError(
            f"{psk_file}: has keys of {len(users)} users: name one (nbds://USER@HOST; over "
            f"QMP: x-nbdmirror-tls-username)"
        )
    return user


# What is wrong.


def _verifies_always(libnbd_version: str) -> bool:
    """Whether this libnbd has the fix of CVE-2024-7383."""
    numbers = [int(part) for part in libnbd_version.split(".")[:3]]
    return numbers >= [1, 20, 3] or [1, 18, 5] <= numbers < [1, 19]


def _own_problem(keys: ClientKeys) -> str:
    certificate = os.path.join(keys.certificates, "client-cert.pem")
    if not keys.certificates or not os.path.exists(certificate):
        return f"it may require a certificate, and {certificate} does not exist"
    key = os.path.join(keys.certificates, "client-key.pem")
    authority = os.path.join(keys.certificates, AUTHORITY)
    problem = _problem(certificate, key, authority, is_server=False)
    other = "it knows another authority, or none, or requires pre-shared keys"
    return f"{certificate}: {problem or other}"


def _problem(certificate: str, key: str, authority: str, *, is_server: bool) -> str:
    """The problem of a certificate of a server or a client; "" if there is none.

    Found by a handshake in memory, in which the other end verifies the certificate. Raises
    ConfigError if the files cannot be used."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    judge = client if is_server else server
    for context in (server, client):
        try:
            context.load_cert_chain(certificate, key, password=lambda: b"")
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"{certificate}: cannot be used with {key}: they should be a certificate and its "
                f"key, in PEM, without a password"
            ) from error
    try:
        judge.load_verify_locations(authority)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{authority}: is not a certificate in PEM") from error
    judge.verify_mode = ssl.CERT_REQUIRED
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(down, up, server_side=False),
        server.wrap_bio(up, down, server_side=True),
    ]
    for _ in range(4):  # flights of a handshake
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError as error:
                return _reason(error, authority, "")
            except ssl.SSLError as error:
                return str(error.reason or error)
    return ""


def _look(keys: ClientKeys, timeout_s: float) -> str:
    """Connect once more, with OpenSSL, which reports why a certificate is not accepted."""
    authority = os.path.join(keys.certificates, AUTHORITY) if keys.certificates else ""
    try:
        context = ssl.create_default_context(cafile=authority or None)
        context.check_hostname = bool(keys.host)
        with _connect(keys.address, timeout_s) as sock:
            _start_tls(sock, timeout_s)
            with context.wrap_socket(sock, server_hostname=keys.host or None):
                pass
    except ssl.SSLCertVerificationError as error:
        return _reason(error, authority, keys.host)
    except (OSError, Unreachable, ValueError, struct.error):
        pass  # this was only to say more
    return f"is it signed by {authority or 'an authority of the system'}, and for this host?"


def _connect(address: tuple[str, int] | str, timeout_s: float) -> socket.socket:
    if isinstance(address, tuple):
        return connection_to(*address, timeout_s)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout_s)
    sock.connect(address)
    return sock


def _reason(error: ssl.SSLCertVerificationError, authority: str, host: str) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return "it has expired"
    if code == _NOT_YET_VALID:
        return "it is not valid yet"
    if code in _UNKNOWN_AUTHORITIES:
        return f"it is not signed by {authority or 'an authority of the system'}"
    if code in _WRONG_NAMES:
        return f"it is for another host than '{host}'"
    return str(error.verify_message)


def _start_tls(sock: socket.socket, timeout_s: float) -> None:
    """NBD's handshake up to the start of TLS. Raises ValueError if TLS does not start."""
    magic, option_magic, _ = struct.unpack(">QQH", _receive(sock, 18, timeout_s))
    if (magic, option_magic) != (_MAGIC, _OPTION_MAGIC):
        raise ValueError
    sock.sendall(struct.pack(">IQII", _FIXED_NEWSTYLE, _OPTION_MAGIC, _STARTTLS, 0))
    magic, option, answer, length = struct.unpack(">QIII", _receive(sock, 20, timeout_s))
    if (magic, option, answer, length) != (_REPLY_MAGIC, _STARTTLS, _ACK, 0):
        raise ValueError


def _receive(sock: socket.socket, length: int, timeout_s: float) -> bytes:
    """Exactly `length` bytes, within `timeout_s`; fewer if the other end closes."""
    data, deadline_s = b"", time.monotonic() + timeout_s
    while len(data) < length and (part := sock.recv(length - len(data))):
        data += part
        sock.settimeout(max(0.001, deadline_s - time.monotonic()))
    sock.settimeout(timeout_s)
    return data
