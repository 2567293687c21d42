"""Connecting to an NBD server within a bound, and the export that it announces.

For any thread; the calls block.
"""

from __future__ import annotations

import operator
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import nbd

from nbdmirror.errors import ConfigError, Unreachable
from nbdmirror.identity import home_of, is_old_side
from nbdmirror.nbd_uri import NbdUri, parse
from nbdmirror.nbdclient import tls
from nbdmirror.nbdclient.handle_state import HandleState
from nbdmirror.nbdclient.tcp_watch import TcpWatch
from nbdmirror.resolver import addresses_of
from nbdmirror.threads import NO_THREAD

DEPTH_CONTEXT = "qemu:allocation-depth"
"""qemu-nbd -A: 0 is unallocated, 1 the top layer, 2 and more the backing files."""

PAYLOAD_BYTES_MAX = 32 << 20
"""Largest request to a server that announces no maximum: the NBD specification's advice to
clients."""

SIZE_BYTES_MAX = (1 << 63) - 1
"""Offsets are signed in all programs, though not in NBD."""

NEXT_ADDRESS_S = 1.0
"""After this time the next address of a name is tried too. (RFC 8305 has a quarter of a second for
TCP alone; this is for the whole handshake.)"""

SEND_BUFFER_BYTES = 1 << 20
"""Send buffer of a Unix socket: one request of the copier."""

CUT_S = 0.5
"""A server that sends without end is cut off so long after its time limit."""

_SO_SNDBUFFORCE = 32  # asm-generic/socket.h; past the limit net.core.wmem_max

EXPLAIN_S_MIN = 2.0
"""For finding out what is wrong with a server's certificate."""

REASON_LENGTH_MAX = 300
"""Longest text of libnbd's that is shown; it may contain a server's text."""

_RELIED_ON = {
    "size": "size",
    "read_only": "read-only",
    "can_flush": "flush",
    "can_fua": "FUA",
    "can_zero": "write-zeroes",
    "minimum": "minimum block size",
}

_GAIN: dict[str, Callable[[Any, Any], bool]] = {
    "size": operator.lt,
    "read_only": operator.gt,
    "can_flush": operator.lt,
    "can_fua": operator.lt,
    "can_zero": operator.lt,
    "minimum": operator.gt,
}
"""Whether a value, before and now, allows more now."""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """An export, as a server announces it at the handshake. Sizes in bytes; `preferred` is 0 if the
    server does not announce it."""

    size: int
    read_only: bool
    can_flush: bool
    can_fua: bool
    can_zero: bool
    can_fast_zero: bool
    can_trim: bool
    can_cache: bool
    can_multi_conn: bool
    """Several connections see one another's writes and flushes."""
    can_extents: bool
    can_depth: bool
    """The server reports the image layer of each range."""
    minimum: int
    preferred: int
    maximum: int

    @classmethod
    def of(cls, handle: nbd.NBD, uri: str) -> ExportInfo:
        """The export of a ready handle. Raises ConfigError if it is missing or impossible."""
        try:
            announced = cls._of(handle)
        except nbd.Error as error:
            raise ConfigError(f"{uri}: the server does not report what it serves") from error
        if not 0 <= announced.size <= SIZE_BYTES_MAX:
            raise ConfigError(f"{uri}: the server announces an impossible size")
        if announced.size % announced.minimum:
            raise ConfigError(
                f"{uri}: its size {announced.size} is not a multiple of its minimum block size "
                f"{announced.minimum}"
            )
        return announced

    @classmethod
    def _of(cls, handle: nbd.NBD) -> ExportInfo:
        return cls(
            size=int(handle.get_size()),
            read_only=bool(handle.is_read_only()),
            can_flush=bool(handle.can_flush()),
            can_fua=bool(handle.can_fua()),
            can_zero=bool(handle.can_zero()),
            can_fast_zero=bool(handle.can_fast_zero()),
            can_trim=bool(handle.can_trim()),
            can_cache=bool(handle.can_cache()),
            can_multi_conn=bool(handle.can_multi_conn()),
            can_extents=bool(handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)),
            can_depth=bool(handle.can_meta_context(DEPTH_CONTEXT)),
            minimum=int(handle.get_block_size(nbd.SIZE_MINIMUM)) or 1,
            preferred=int(handle.get_block_size(nbd.SIZE_PREFERRED)),
            maximum=int(handle.get_block_size(nbd.SIZE_MAXIMUM)) or PAYLOAD_BYTES_MAX,
        )

    def change(self, now: ExportInfo, *, may_gain: bool = False) -> str:
        """The first property that must stay and has changed (rule 40), as text; "" if none has.
        `may_gain`: the disk may have grown, and the server may do more than before: who uses what
        was announced before misses nothing."""
        before, after = asdict(self), asdict(now)
        for name, what in _RELIED_ON.items():
            has_gained = may_gain and _GAIN[name](before[name], after[name])
            if before[name] != after[name] and not has_gained:
                return f"{what} was {before[name]}, is {after[name]}"
        return ""

    def refusal(self, now: ExportInfo, *, may_gain: bool, is_link: bool) -> str:
        """Why a new connection, with `now`, cannot be used; "" if it can. `is_link`: it is one of
        several."""
        if change := self.change(now, may_gain=may_gain):
            return f"came back changed ({change}); it is not written to"
        return "announces no multi-conn any more" if is_link and not now.can_multi_conn else ""


def connect(
    uri: str, timeout_s: float, *, for_data_alone: bool = False, to_mirror: bool = False
) -> nbd.NBD:
    """A handle of `uri` that is ready for requests, within `timeout_s` with the handshake. Raises
    ConfigError with one clear line.

    A name may have several addresses. The next address is tried when one refuses, or is not ready
    after NEXT_ADDRESS_S; the first one that is ready is used.

    `for_data_alone`: without structured replies, and so without block status. qemu-nbd queries its
    storage for holes before it answers a read with a structured reply: then reads take a fifth
    longer.

    `to_mirror`: the export is a mirror's target. If it is the old side of a disk, and a target
    only, the mirror uses another export of its server.
    """
    deadline_s = time.monotonic() + timeout_s
    handle = _connect(uri, timeout_s, for_data_alone=for_data_alone)
    if not to_mirror or not is_old_side(export_of(handle)[1]):
        return handle
    with suppress(nbd.Error):
        handle.aio_disconnect(0)
    where = parse(uri)
    home, left_s = replace(where, export=home_of(where.export)).exact, deadline_s - time.monotonic()
    try:
        return _connect(home, left_s, for_data_alone=for_data_alone)
    except ConfigError as error:
        raise Unreachable(
            f"'{uri}' is the old side of a disk, and accepts a mirror only from the server that "
            f"has the disk; the log of the server there says why this mirror is refused"
        ) from error


def _connect(uri: str, timeout_s: float, *, for_data_alone: bool) -> nbd.NBD:
    where = parse(uri)
    keys = tls.client_keys(uri, nbd.NBD().get_version())
    deadline_s = time.monotonic() + timeout_s
    waiting = _addresses(uri, where, timeout_s)
    attempts: list[_Attempt] = []
    why, next_s = "", 0.0
    while waiting or attempts:
        now_s = time.monotonic()
        if waiting and (not attempts or now_s >= next_s):
            attempt = _Attempt(waiting.pop(0), keys, for_data_alone=for_data_alone)
            attempts.append(attempt)
            next_s = now_s + NEXT_ADDRESS_S
        _wait(attempts, min(deadline_s, next_s) if waiting else deadline_s, deadline_s)
        for attempt in list(attempts):
            if attempt.is_ready:
                with socket.socket(fileno=os.dup(attempt.fileno())) as own:
                    TcpWatch(own).begin()
                return attempt.handle
            if attempt.failure is not None:
                attempts.remove(attempt)
                why = why or attempt.failure
        if attempts and time.monotonic() >= deadline_s:
            raise Unreachable(f"{uri}: no answer from the NBD server within {timeout_s:g} s")
    left_s = max(EXPLAIN_S_MIN, deadline_s - time.monotonic())
    raise Unreachable(f"Failed to connect to '{uri}': {tls.explain(keys, why, left_s)}")


class _Attempt:
    """An attempt to connect to one address. It ends with its last reference."""

    def __init__(self, uri: str, keys: tls.ClientKeys | None, *, for_data_alone: bool) -> None:
        self.handle = handle = nbd.NBD()
        self._handle_state = HandleState(handle)
        self.failure: str | None = None
        """Why the attempt has failed; None if it has not."""
        if keys is not None and keys.user:
            handle.set_tls_username(keys.user)
        where = parse(uri)
        handle.set_tls_verify_peer(where.verifies_peer)  # libnbd before 1.16 does not read it there
        handle.set_full_info(True)  # for `export_of`
        if for_data_alone:
            handle.set_request_structured_replies(False)
            handle.set_pread_initialize(False)  # a simple reply always has all of its data
        else:
            handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
            handle.add_meta_context(DEPTH_CONTEXT)  # ignored by servers that do not have it
        handle.set_uri_allow_local_file(True)
        # A structured reply may leave parts out: a server must not do that, but libnbd accepts it.
        # So a buffer is zeroed before a read, so that its old content never gets out.
        self._try(lambda: handle.aio_connect_uri(uri))
        if _has_to_know_name(where):
            with suppress(OSError, nbd.Error):  # the attempt has already failed
                _hasten(handle)

    @property
    def is_ready(self) -> bool:
        return self.failure is None and bool(self.handle.aio_is_ready())

    def fileno(self) -> int:
        return int(self.handle.aio_get_fd())

    def mask(self) -> int:
        direction = self._handle_state.direction()
        reads, writes = direction & nbd.AIO_DIRECTION_READ, direction & nbd.AIO_DIRECTION_WRITE
        return (select.POLLIN if reads else 0) | (select.POLLOUT if writes else 0)

    def notify(self) -> None:
        is_reading = self._handle_state.direction() & nbd.AIO_DIRECTION_READ
        self._try(self.handle.aio_notify_read if is_reading else self.handle.aio_notify_write)

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except nbd.Error as error:
            self.failure = reason(error)
            return
        if self._handle_state.is_gone:
            self.failure = "the server closed the connection"


def _wait(attempts: list[_Attempt], until_s: float, deadline_s: float) -> None:
    """Wait until an attempt has made a step, or until `until_s`."""
    poll = select.poll()
    by_fd = {}
    for attempt in attempts:
        if attempt.failure is not None or attempt.is_ready:
            return
        by_fd[attempt.fileno()] = attempt
        poll.register(attempt.fileno(), attempt.mask())
    left_s = max(0.0, until_s - time.monotonic())
    for fd, _ in poll.poll(int(left_s * 1000) + 1):
        with _cut_off_at(deadline_s + CUT_S, fd):
            by_fd[fd].notify()


@contextmanager
def _cut_off_at(moment_s: float, fd: int) -> Iterator[None]:
    """libnbd reads all replies to an option. A server that sends replies without end would block it
    for ever."""
    with socket.socket(fileno=os.dup(fd)) as own:

        def cut() -> None:
            with suppress(OSError):  # not connected yet
                own.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(max(0.0, moment_s - time.monotonic()), cut)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError as error:
            raise Unreachable(NO_THREAD) from error
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


def _addresses(uri: str, where: NbdUri, timeout_s: float) -> list[str]:
    """A URI for each address of a server's name. With certificates libnbd needs the name, to
    compare it, and tries the addresses itself (`_hasten`); the resolver answers at least. Raises
    Unreachable if it does not."""
    if where.transport != "tcp":
        return [where.exact]
    try:
        hosts = addresses_of(where.host, where.port, timeout_s)
    except Unreachable as error:
        raise Unreachable(f"{uri}: {error}") from error
    except OSError:
        return [where.exact]  # libnbd reports the error
    if _has_to_know_name(where):
        return [where.exact]
    return [replace(where, host=host).exact for host in hosts]


def _has_to_know_name(where: NbdUri) -> bool:
    return where.is_tls and not where.psk_file and where.verifies_peer


def _hasten(handle: nbd.NBD) -> None:
    """Let the kernel give up an address that does not answer after 3 s, not after two minutes: then
    libnbd tries the next one."""
    with socket.socket(fileno=os.dup(handle.aio_get_fd())) as own:
        if own.family in (socket.AF_INET, socket.AF_INET6):
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, 1)


def export_of(handle: nbd.NBD) -> tuple[str, str]:
    """The export's name and its description, as the server reports them: for a default export its
    real name. Raises nbd.Error without a connection."""
    name, description = str(handle.get_export_name()), ""
    with suppress(nbd.Error):
        name = str(handle.get_canonical_export_name())
    with suppress(nbd.Error):
        description = str(handle.get_export_description())
    return name, description


def has_wide_lengths(handle: nbd.NBD) -> bool:
    """Whether lengths have 64 bits, and not 32, on this ready connection: libnbd has extended
    headers since 1.18, QEMU's servers since 8.2, nbdkit not yet."""
    negotiated = getattr(handle, "get_extended_headers_negotiated", None)  # libnbd 1.18
    return negotiated is not None and bool(negotiated())


def reason(error: Any) -> str:
    """`readable` for the text of an nbd.Error."""
    return readable(str(error.string))


def readable(text: str) -> str:
    """A message of libnbd without its function's name: one line that can be shown on a terminal."""
    text = text.split(": ", 1)[1] if ": " in text else text
    return "".join(c if c.isprintable() else "?" for c in text[:REASON_LENGTH_MAX])


def widen(own: socket.socket) -> None:
    """Give a Unix socket a larger send buffer: then a request of 1 MiB is sent in one or two steps
    instead of five, each of which costs a turn of the loop. TCP sizes its buffers itself."""
    if own.family == socket.AF_UNIX:
        for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
            with suppress(OSError):  # only root may set the first one
                own.setsockopt(socket.SOL_SOCKET, option, SEND_BUFFER_BYTES)
                return
