"""nbdmirror's nbdkit plugin: nbdkit python nbdmirror-plugin.py file=[NAME=]DISK ... [qmp=PATH] ...

    file=[NAME=]DISK   a raw file, a block device or an NBD URI; may be repeated
    qmp=PATH           control socket
    cache=none         O_DIRECT instead of the page cache (default: writeback)
    read-only=true     open the disks for reading only
    mirror-to=URI      start mirroring the first disk at once
    connections=N      most connections to an NBD server (default: 9)
    state-dir=DIR      keep mirrors and persistent bitmaps there over restarts
    pidfile=PATH       what nbdkit's -P names: locked, and removed at the end
    open-timeout=SECONDS   try so long to connect to disks' NBD servers (default: once)
    keepalive=SECONDS  give up guests on TCP without a sign of life for so long (default: 300)
    accept-old-side=ID   serve a disk that was pivoted away from; the refusal shows the ID

Callbacks only; what they do is in the package. The table of callbacks is nbdkit's, so their order
is its life cycle.
"""

import logging
import os
import sys
import traceback

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import nbdkit

try:
    from nbdmirror import startup_error as startup
    from nbdmirror.errors import IO_ERRORS, ConfigError, Error, errno_of
    from nbdmirror.identity import label
    from nbdmirror.logs import print_startup_error
    from nbdmirror.nbdkit_host.process import PluginProcess
    from nbdmirror.nbdkit_host.thread_states import ThreadStates, local, start_deleting
except SystemExit as refusal:  # one line, and not a traceback
    sys.stderr.write(f"{refusal}\n")
    os._exit(1)
except ImportError as error:
    # What is compiled is for one version of Python: nbdkit's may be another one than that which
    # nbdmirror is installed for.
    sys.stderr.write(
        f"nbdmirror: nbdkit's Python {sys.version.split()[0]} cannot load what nbdmirror needs "
        f"({error}): install nbdmirror for this Python, and have PYTHONPATH or PATH lead there\n"
    )
    os._exit(1)

API_VERSION = 2
process = PluginProcess()


class Handle:
    """One guest connection."""

    def __init__(self, disk, read_only):
        self.disk = disk
        self.read_only = read_only or disk.read_only
        self.kept = ThreadStates()


format_exception = traceback.format_exception


def format_briefly(kind, error, trace):
    """nbdkit logs a callback's exception with this. What a disk or a guest did is no bug of ours:
    one line, without a traceback; and of a lasting cause not each time."""
    is_ours = not isinstance(error, IO_ERRORS)
    text = "".join(format_exception(kind, error, trace)) if is_ours else str(error)
    return [text if process.log is None else process.log.text_of(error, text)]


traceback.format_exception = format_briefly


def refuse(error, *, say=print_startup_error):
    """The server does not start: one line where the user looks, and exit status 1, as nbdkit has
    it."""
    say(str(error))
    startup.tell(str(error))
    process.abandon()
    os._exit(1)


def passing_errno(call):
    """The guest gets the errno as the disk gave it; and the thread's state is kept."""

    def guarded(h, *arguments):
        try:
            local.is_kept
        except AttributeError:
            h.kept.keep()
        try:
            return call(h, *arguments)
        except IO_ERRORS as error:
            nbdkit.set_error(errno_of(error))
            raise

    return guarded


def config(key, value):
    try:
        process.configure(key, value)
    except ConfigError as error:
        refuse(error)


def config_complete():
    try:
        process.check()
    except ConfigError as error:
        refuse(error)


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def get_ready():
    try:
        process.open()
    except ConfigError as error:
        refuse(error)


def after_fork():
    try:
        process.start(nbdkit.shutdown)  # first: it blocks the signals that threads would take
        start_deleting()
    except (Error, OSError, RuntimeError) as error:  # the last one: no thread can be had
        refuse(error, say=logging.getLogger("nbdmirror").error)


def cleanup():
    process.stop()


def list_exports(readonly, is_tls):
    return list(process.disks)


def default_export(readonly, is_tls):
    return next(iter(process.disks))


def open(readonly):
    h = Handle(process.exports.find(nbdkit.export_name()), readonly)
    process.exports.opened(h, h.disk)
    return h


def close(h):
    process.exports.closed(h)
    h.kept.release()


def export_description(h):
    return label(h.disk.name)


def get_size(h):
    return h.disk.size


def block_size(h):
    size = h.disk.source.block_size
    return 1, max(512, size.preferred), 0xFFFFFFFF


def can_write(h):
    return not h.read_only


def can_multi_conn(h):
    return True


def can_flush(h):
    return True


def can_fua(h):
    return nbdkit.FUA_NATIVE


def can_trim(h):
    return True


def can_zero(h):
    return True


def can_fast_zero(h):
    return True


def can_extents(h):
    return True


def can_cache(h):
    return nbdkit.CACHE_NATIVE


def pread(h, buf, offset, flags):
    try:
        local.is_kept
    except AttributeError:
        h.kept.keep()
    try:
        h.disk.pread(buf, offset)
    except IO_ERRORS as error:
        nbdkit.set_error(errno_of(error))
        raise


def pwrite(h, buf, offset, flags):
    try:
        local.is_kept
    except AttributeError:
        h.kept.keep()
    try:
        h.disk.pwrite(buf, offset, flags != 0)  # FUA is the only flag that a write has
    except IO_ERRORS as error:
        nbdkit.set_error(errno_of(error))
        raise


@passing_errno
def flush(h, flags):
    h.disk.flush()


@passing_errno
def trim(h, count, offset, flags):
    h.disk.trim(offset, count, fua=bool(flags & nbdkit.FLAG_FUA))


@passing_errno
def zero(h, count, offset, flags):
    h.disk.zero(
        offset,
        count,
        may_trim=bool(flags & nbdkit.FLAG_MAY_TRIM),
        fua=bool(flags & nbdkit.FLAG_FUA),
        fast=bool(flags & nbdkit.FLAG_FAST_ZERO),
    )


@passing_errno
def cache(h, count, offset, flags):
    h.disk.cache(offset, count)


@passing_errno
def extents(h, count, offset, flags):
    found, position = [], offset
    for extent in h.disk.extents(offset, count):
        kind = (nbdkit.EXTENT_ZERO if extent.zero else 0) | (
            nbdkit.EXTENT_HOLE if extent.hole else 0
        )
        found.append((position, extent.length, kind))
        position += extent.length
    return found
