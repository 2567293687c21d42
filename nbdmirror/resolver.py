"""The addresses of a host's name, within a bound.

The C library waits for a resolver that does not answer for as long as resolv.conf says, mostly for
half a minute and more, and that cannot be ended. So it waits on a thread of its own. A later call
for the same name waits for the same answer, so such threads do not pile up.

For any thread.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from functools import partial
from typing import Any

from nbdmirror.errors import Unreachable
from nbdmirror.threads import start_thread


class _Lookup:
    """One question to the resolver."""

    def __init__(self) -> None:
        self.is_answered = threading.Event()
        self.found: list[str] = []
        self.error: OSError | None = None


_open: dict[tuple[str, int], _Lookup] = {}
_lock = threading.Lock()  # guards `_open`


def addresses_of(host: str, port: int, timeout_s: float) -> list[str]:
    """The addresses in the resolver's order, each once. Raises the resolver's OSError, and
    Unreachable after `timeout_s`."""
    with suppress(OSError):
        return _resolve(host, port, socket.AI_NUMERICHOST)
    with _lock:
        lookup = _open.get((host, port))
        if lookup is None:
            lookup = _open[host, port] = _Lookup()
            start_thread(partial(_ask, lookup, host, port), "nbdmirror-resolver")
    if not lookup.is_answered.wait(max(0.0, timeout_s)):
        raise Unreachable(
            f"the name '{host}' has no address after {timeout_s:g} s: the resolver does not answer"
        )
    if lookup.error is not None:
        raise lookup.error
    return lookup.found


def connection_to(host: str, port: int, timeout_s: float) -> socket.socket:
    """A TCP connection to the first address that takes one. The resolver has `timeout_s`, and each
    address has as long. Raises as `addresses_of`."""
    *others, last = addresses_of(host, port, timeout_s)
    for address in others:
        with suppress(OSError):
            return socket.create_connection((address, port), timeout_s)
    return socket.create_connection((last, port), timeout_s)


def _ask(lookup: _Lookup, host: str, port: int) -> None:
    try:
        lookup.found = _resolve(host, port, 0)
    except OSError as error:
        lookup.error = error
    finally:
        with _lock:
            del _open[host, port]
        lookup.is_answered.set()


def _resolve(host: str, port: int, flags: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except UnicodeError as error:  # an empty label (a..b), or one of more than 63 bytes
        raise socket.gaierror(socket.EAI_NONAME, f"'{host}' is no name of a host") from error
    return list(dict.fromkeys(_host(address) for *_, address in found))


def _host(address: tuple[Any, ...]) -> str:
    """A numeric host, with the interface of a link-local address, which getaddrinfo leaves out."""
    host = str(address[0])
    has_zone = len(address) > 3 and address[3] and "%" not in host
    return f"{host}%{socket.if_indextoname(address[3])}" if has_zone else host
