"""Keeping CPython's thread states alive in nbdkit's threads, for 5 to 7 times the requests per
second.

nbdkit wraps each callback in PyGILState_Ensure and PyGILState_Release. Its threads are not
Python's, so each request creates and destroys a thread state, with its frame stack. One more Ensure
without a Release keeps the state. The price: the state must be deleted after the thread's
connection has ended, or each connection leaks some kilobytes.

One thread, started by `start_deleting`, deletes the states. Since CPython 3.12, deleting the state
of another thread also clears the deleting thread's own slot for PyGILState
(`unbind_gilstate_tstate` in pystate.c). In one of nbdkit's threads the next PyGILState_Release
would then abort the process. A thread that Python started does not need that slot if it calls
nothing that uses PyGILState: this thread only waits for states and deletes them."""

from __future__ import annotations

import ctypes
import queue
import threading

_api = ctypes.pythonapi
_api.PyGILState_Ensure.restype = ctypes.c_int
_api.PyGILState_Release.argtypes = [ctypes.c_int]
_api.PyThreadState_Get.restype = ctypes.c_void_p
_api.PyThreadState_Clear.argtypes = [ctypes.c_void_p]
_api.PyThreadState_Delete.argtypes = [ctypes.c_void_p]
_STATE_WAS_THERE = 0  # PyGILState_LOCKED: give back one level only

local = threading.local()
"""`local.is_kept` exists in threads whose state is kept; an attribute look-up is the cheapest
test."""

_ended: queue.SimpleQueue[int] = queue.SimpleQueue()
"""Thread states whose threads have ended."""


class ThreadStates:
    """The kept thread states of one connection. Its threads call `keep`. `release` is called once,
    after nbdkit has joined all of them except the caller."""

    def __init__(self) -> None:
        self._states: list[int] = []

    def keep(self) -> None:
        """Keep this thread's state until `release`. Call once on each thread."""
        _api.PyGILState_Ensure()
        self._states.append(_api.PyThreadState_Get())
        local.is_kept = True

    def release(self) -> None:
        """Delete the states: nbdkit's release, which follows, deletes this thread's; the thread of
        `start_deleting` deletes the others soon."""
        current = _api.PyThreadState_Get()
        for state in self._states:
            if state == current:
                _api.PyGILState_Release(_STATE_WAS_THERE)
                del local.is_kept
            else:
                _ended.put(state)
        self._states.clear()


def start_deleting() -> None:
    """Start the thread that deletes the states of ended threads. Call this once, after nbdkit has
    forked; states that were released earlier wait for it."""
    threading.Thread(target=_delete_ended, name="nbdmirror-thread-states", daemon=True).start()


def _delete_ended() -> None:
    while True:
        state = _ended.get()
        _api.PyThreadState_Clear(state)
        _api.PyThreadState_Delete(state)
