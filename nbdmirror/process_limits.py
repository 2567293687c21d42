"""What this process may have of the host, and which limit an error is due to.

The kernel's errors (EMFILE, ENOMEM, EAGAIN) name no limit, and the same error of a library looks
like a broken installation. For any thread; imports little, since there may be no room.
"""

from __future__ import annotations

import errno
import re
import resource
import threading

MEMORY_BYTES_MIN = 400 << 20
"""Address space that a server needs before its first guest: nbdkit, Python and their libraries have
290 MiB, and its threads the rest."""

THREADS_NEEDED = 28
"""Threads that must be possible when a server starts: nbdmirror has about ten, a guest's connection
at most 16 by default, and a mirror two. With fewer a guest's requests would fail, or the server
half start."""

_MiB = 1 << 20
_NO_MEMORY = re.compile(
    r"failed to map segment|cannot allocate memory|MemoryError|out of memory"
    r"|cannot apply additional memory protection|cannot create shared object descriptor",
    re.IGNORECASE,
)
_NO_DESCRIPTOR = re.compile(r"too many open files|: Error 24$", re.IGNORECASE | re.MULTILINE)
_NO_THREAD = re.compile(r"can't (start|create) new thread|pthread_create|resource temporarily unav")


def no_descriptor() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"this process may have {limit} open files: allow more (ulimit -n, LimitNOFILE)"


def no_memory() -> str:
    if bound := _address_space():
        text = f"this process may have {bound // _MiB} MiB of address space"
        return f"{text}: allow more (ulimit -v, LimitAS)"
    return "no memory is left: allow more (MemoryMax), or free some"


def no_thread() -> str:
    """The kernel has one error for all of these limits."""
    text = "no thread can be started: "
    if _address_space():
        text += f"{no_memory()}, or "
    return f"{text}its user's limit, or its unit's, is reached (ulimit -u, TasksMax)"


def limit_of(error: BaseException) -> str:
    """The limit that `error` is due to, and what to do; "" for any other error."""
    if isinstance(error, MemoryError):
        return no_memory()
    if isinstance(error, RuntimeError | ImportError):
        return limit_in(str(error))
    if not isinstance(error, OSError):
        return ""
    if error.errno == errno.EMFILE:
        return no_descriptor()
    if error.errno == errno.ENFILE:
        return "this host has no more open files: allow more (sysctl fs.file-max)"
    if error.errno == errno.ENOMEM:
        return no_memory()
    is_output = hasattr(error, "characters_written")  # of a stream that has no reader now
    return no_thread() if error.errno == errno.EAGAIN and not is_output else ""


def text_of(error: BaseException) -> str:
    """What `error` says, with the limit that the error, or its cause, is due to."""
    text = limit_of(error) or str(error) or type(error).__name__
    limit = limit_of(error.__cause__) if error.__cause__ is not None else ""
    return f"{text}: {limit}" if limit else text


def limit_in(text: str) -> str:
    """The same for what a program or a library has written."""
    for pattern, tell in (
        (_NO_DESCRIPTOR, no_descriptor),
        (_NO_MEMORY, no_memory),
        (_NO_THREAD, no_thread),
    ):
        if pattern.search(text):
            return tell()
    return ""


def environment() -> dict[str, str]:
    """Variables for a server. glibc reserves 64 MiB of address space for almost each thread, unless
    it is told not to; with a limit nothing would be left for the threads' stacks."""
    return {"MALLOC_ARENA_MAX": "2"} if _address_space() else {}


def too_little() -> str:
    """Why no server can start, whatever it serves; "" if nothing is known to be too little."""
    bound = _address_space()
    if 0 < bound < MEMORY_BYTES_MIN:
        return f"a server needs {MEMORY_BYTES_MIN // _MiB} MiB of address space; {no_memory()}"
    return ""


def check_threads(count: int = THREADS_NEEDED) -> None:
    """Raise RuntimeError unless `count` more threads can be started at a time."""
    end, started = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        end.set()
        for thread in started:
            thread.join()


def _address_space() -> int:
    """Bytes; 0 without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return 0 if soft == resource.RLIM_INFINITY else soft
