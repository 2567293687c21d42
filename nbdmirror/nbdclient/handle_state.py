"""Looking at a libnbd handle's state without letting go of the GIL.

libnbd's binding lets go of the GIL in every call, those too that only read a flag. Where guests'
threads wait for it, each such look costs the event loop its turn: some ten microseconds, ten times
a request (docs/measurements/2026-11-24.md). So these, which libnbd answers without waiting, are
called past the binding. Where that cannot be, the binding's own methods serve.
"""

from __future__ import annotations

import ctypes
import select
from collections.abc import Callable
from functools import partial

import nbd

_READ, _WRITE = nbd.AIO_DIRECTION_READ, nbd.AIO_DIRECTION_WRITE
_TROUBLE = select.POLLHUP | select.POLLERR | select.POLLNVAL
_MASKS = {
    0: 0,
    _READ: select.POLLIN,
    _WRITE: select.POLLOUT,
    _READ | _WRITE: select.POLLIN | select.POLLOUT,
}


class HandleState:
    """What is asked of a handle, and answered at once."""

    __slots__ = ("_handle", "completed", "direction", "is_closed", "is_dead", "is_processing")

    def __init__(self, handle: nbd.NBD) -> None:
        self._handle = handle  # the pointer is good for as long as it lives
        self.direction: Callable[[], int] = handle.aio_get_direction
        self.is_dead: Callable[[], int] = handle.aio_is_dead
        self.is_closed: Callable[[], int] = handle.aio_is_closed
        self.is_processing: Callable[[], int] = handle.aio_is_processing
        self.completed: Callable[[int], int] = self._completed
        """1: the command with that cookie has succeeded, -1: failed (`error`), 0: is in flight."""
        if _library is not None:
            try:
                pointer = ctypes.c_void_p(_pointer(handle._o, _CAPSULE))
            except (AttributeError, ValueError):
                return  # another binding
            self.direction = partial(_library.nbd_aio_get_direction, pointer)
            self.is_dead = partial(_library.nbd_aio_is_dead, pointer)
            self.is_closed = partial(_library.nbd_aio_is_closed, pointer)
            self.is_processing = partial(_library.nbd_aio_is_processing, pointer)
            self.completed = partial(_library.nbd_aio_command_completed, pointer)

    def _completed(self, cookie: int) -> int:
        try:
            return int(self._handle.aio_command_completed(cookie))
        except nbd.Error:
            return -1

    @staticmethod
    def error() -> tuple[int, str]:
        """errno and words of what failed last in this thread; 0 and none if that is not known."""
        if _library is None:
            return 0, "the command failed"
        return _library.nbd_get_errno(), (_library.nbd_get_error() or b"").decode()

    @property
    def is_gone(self) -> bool:
        """Dead, or closed by the server in order, as one does that ends."""
        return bool(self.is_dead() or self.is_closed())

    def mask(self) -> int:
        """What to poll its socket for; 0 if it is dead."""
        return _MASKS[self.direction()]

    def notify(self, mask: int) -> None:
        """Have libnbd do what its socket is ready for. Raises nbd.Error when the connection
        broke."""
        direction = self.direction()
        if direction & _READ and mask & (select.POLLIN | _TROUBLE):
            self._notify_read()
        elif direction & _WRITE and mask & (select.POLLOUT | _TROUBLE):
            self._handle.aio_notify_write()

    def _notify_read(self) -> None:
        """Have libnbd read what has come. Raises nbd.Error when the connection broke.

        If nothing is there to read (two drivers saw the same reply while the event loop took over,
        or a record of TLS itself came), libnbd 1.14 to 1.24 waits for the first byte of a reply and
        sends no request until then. After a second notification the handle is ready again.
        """
        self._handle.aio_notify_read()
        while self._is_stuck():
            self._handle.aio_notify_read()

    def _is_stuck(self) -> bool:
        # A handle that sends a request waits to write, and one with a part of a reply is ready.
        return bool(self.is_processing()) and self.direction() == _READ


def _open_library() -> ctypes.PyDLL | None:
    try:
        library = ctypes.PyDLL("libnbd.so.0")  # the one that the binding has loaded
        for name in ("get_direction", "is_dead", "is_closed", "is_processing"):
            getattr(library, f"nbd_aio_{name}").argtypes = (ctypes.c_void_p,)
        library.nbd_aio_command_completed.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
        library.nbd_get_error.restype = ctypes.c_char_p
    except (OSError, AttributeError):
        return None
    return library


_CAPSULE = b"nbd_handle"
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_library = _open_library()
