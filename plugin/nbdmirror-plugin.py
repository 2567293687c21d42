"""nbdmirror's nbdkit plugin: nbdkit python nbdmirror-plugin.py file=[NAME=]DISK ... [qmp=PATH] ...

    file=[NAME=]DISK   a raw file, a block device or an NBD URI; may be repeated
    qmp=PATH           control socket
    cache=none         O_DIRECT instead of the page cache (default: writeback)
    read-only=true     open the disks for reading only
    journal=DISK       the disk is an image: serve a point of this journal
    point=POINT        which point: a number, a name or a time (default: the newest)
    mirror-to=URI      start mirroring the first disk at once
    connections=N      most connections to an NBD server (default: 9)
    state-dir=DIR      keep mirrors and persistent bitmaps there across restarts
    pidfile=PATH       the file of nbdkit's -P: locked, and removed at the end
    open-timeout=SECONDS   repeat attempts to connect to disks' NBD servers (default: one attempt)
    keepalive=SECONDS  disconnect TCP guests after this silence (default: 300)
    log-format=json    each line of the log is a JSON object (default: plain)
    accept-old-side=ID   serve the old side of a pivot; the refusal shows the ID

This file has only callbacks; the package does the work. The callbacks are in the order of nbdkit's
life cycle.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, TypeVar

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until nbdkit has its handler, Ctrl-C ends the process, as with other plugins of nbdkit, and
    # does not raise an exception somewhere in Python.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

sys.path.insert(0, os.path.realpath(os.path.join(os.path.dirname(__file__), "..")))

import nbdkit

gc.disable()  # until the server starts: what imports make is no garbage
try:
    from nbdmirror import process_limits
    from nbdmirror import startup_error as startup

    if too_little := process_limits.too_little():  # the other modules could not be loaded
        raise SystemExit(f"nbdmirror: {too_little}")
    from nbdmirror.disk.disk import Disk
    from nbdmirror.errors import IO_ERRORS, ConfigError, DeviceError, Error, guest_errno
    from nbdmirror.foreign_text import visible
    from nbdmirror.identity import label
    from nbdmirror.logs import print_startup_error
    from nbdmirror.nbdkit_host.process import PluginProcess
    from nbdmirror.nbdkit_host.thread_states import ThreadStates, local, start_deleting
    from nbdmirror.server.exports import OldSideExport
    from nbdmirror.threads import start_no_more_threads
except SystemExit as refusal:  # one line, not a traceback
    sys.stderr.write(f"{refusal}\n")
    os._exit(1)
except (ImportError, MemoryError, OSError) as error:
    if limit := process_limits.limit_of(error):
        sys.stderr.write(f"nbdmirror: the server cannot be loaded: {limit}\n")
        os._exit(1)
    # Compiled modules are for one version of Python; nbdkit's may be another version than that of
    # nbdmirror's installation.
    sys.stderr.write(
        f"nbdmirror: nbdkit's Python {sys.version.split()[0]} cannot load what nbdmirror needs "
        f"({error}): install nbdmirror for this Python, and set PYTHONPATH or PATH accordingly\n"
    )
    os._exit(1)

Result = TypeVar("Result")

API_VERSION = 2
process = PluginProcess()


class Handle:
    """One guest connection."""

    def __init__(self, disk: Disk | OldSideExport, read_only: bool) -> None:
        self.disk = disk
        self.read_only = read_only or disk.read_only
        self.kept = ThreadStates()


format_exception = traceback.format_exception


def format_briefly(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> list[str]:
    """nbdkit logs a callback's exception with this. An error of a disk or a guest is not a bug: one
    line without a traceback, and not each time if the cause lasts."""
    is_ours = not isinstance(error, IO_ERRORS)
    text = "".join(format_exception(kind, error, trace)) if is_ours else visible(str(error))
    return [text if process.log is None else process.log.text_of(error, text)]


traceback.format_exception = format_briefly  # type: ignore[assignment]


def refuse(error: BaseException, *, say: Callable[[str], None] = print_startup_error) -> NoReturn:
    """The server does not start: one line on stderr, and exit status 1, as nbdkit does."""
    text = process_limits.text_of(error)
    say(text)
    startup.tell(text)
    process.abandon()
    os._exit(1)


def passing_errno(call: Callable[..., Result]) -> Callable[..., Result]:
    """Pass the disk's errno to the guest, and keep the thread's state."""

    def guarded(h: Handle, *arguments: int) -> Result:
        try:
            local.is_kept
        except AttributeError:
            h.kept.keep()
        try:
            return call(h, *arguments)
        except IO_ERRORS as error:
            nbdkit.set_error(guest_errno(error))
            raise

    return guarded


def config(key: str, value: str) -> None:
    try:
        process.configure(key, value)
    except ConfigError as error:
        refuse(error)


def config_complete() -> None:
    try:
        process.check()
    except ConfigError as error:
        refuse(error)


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def get_ready() -> None:
    try:
        process.open()
    except (ConfigError, OSError, RuntimeError, MemoryError) as error:
        refuse(error)


def after_fork() -> None:
    try:
        process.start(nbdkit.shutdown)  # first: this blocks the signals that threads would get
        start_deleting()
    except (Error, OSError, RuntimeError, MemoryError) as error:  # RuntimeError: no thread
        refuse(error, say=logging.getLogger("nbdmirror").error)


def cleanup() -> None:
    process.stop()
    start_no_more_threads()  # what comes next is the interpreter's end


def preconnect(readonly: bool) -> None:
    process.descriptors.check_room()


def list_exports(readonly: bool, is_tls: bool) -> list[str]:
    return list(process.disks)


def default_export(readonly: bool, is_tls: bool) -> str:
    return next(iter(process.disks))


def export_name() -> str:
    """The name that the client asks for. Raises DeviceError."""
    try:
        return str(nbdkit.export_name())
    except UnicodeDecodeError:
        text = "no export is called so: the client's name for one is not UTF-8"
        raise DeviceError(text, errno.ENOENT) from None


def open(readonly: bool) -> Handle:
    h = Handle(process.exports.find(export_name()), readonly)
    process.exports.opened(h, h.disk)
    return h


def close(h: Handle) -> None:
    process.exports.closed(h)
    h.kept.release()


def export_description(h: Handle) -> str:
    return label(h.disk.name)


def get_size(h: Handle) -> int:
    return h.disk.size


def block_size(h: Handle) -> tuple[int, int, int]:
    size = h.disk.source.block_size
    return 1, max(512, size.preferred), 0xFFFFFFFF


def can_write(h: Handle) -> bool:
    return not h.read_only


def can_multi_conn(h: Handle) -> bool:
    return True


def can_flush(h: Handle) -> bool:
    return True


def can_fua(h: Handle) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_trim(h: Handle) -> bool:
    return True


def can_zero(h: Handle) -> bool:
    return True


def can_fast_zero(h: Handle) -> bool:
    return True


def can_extents(h: Handle) -> bool:
    return True


def can_cache(h: Handle) -> int:
    return int(nbdkit.CACHE_NATIVE)


def pread(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    try:
        local.is_kept
    except AttributeError:
        h.kept.keep()
    try:
        h.disk.pread(buf, offset)
    except IO_ERRORS as error:
        nbdkit.set_error(guest_errno(error))
        raise


def pwrite(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    try:
        local.is_kept
    except AttributeError:
        h.kept.keep()
    try:
        h.disk.pwrite(buf, offset, flags != 0)  # FUA is the only flag that a write has
    except IO_ERRORS as error:
        nbdkit.set_error(guest_errno(error))
        raise


@passing_errno
def flush(h: Handle, flags: int) -> None:
    h.disk.flush()


@passing_errno
def trim(h: Handle, count: int, offset: int, flags: int) -> None:
    h.disk.trim(offset, count, fua=bool(flags & nbdkit.FLAG_FUA))


@passing_errno
def zero(h: Handle, count: int, offset: int, flags: int) -> None:
    h.disk.zero(
        offset,
        count,
        may_trim=bool(flags & nbdkit.FLAG_MAY_TRIM),
        fua=bool(flags & nbdkit.FLAG_FUA),
        fast=bool(flags & nbdkit.FLAG_FAST_ZERO),
    )


@passing_errno
def cache(h: Handle, count: int, offset: int, flags: int) -> None:
    h.disk.cache(offset, count)


@passing_errno
def extents(h: Handle, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    found, position = [], offset
    for extent in h.disk.extents(offset, count):
        kind = (nbdkit.EXTENT_ZERO if extent.zero else 0) | (
            nbdkit.EXTENT_HOLE if extent.hole else 0
        )
        found.append((position, extent.length, kind))
        position += extent.length
    return found
