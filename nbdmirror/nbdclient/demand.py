"""Demand: whether guests that share one connection need links (exclusive_set.py).

A link costs its guest something. The server is busy with the handshake meanwhile, and may let the
disk's other requests wait: nbdkit's file plugin looks for the file's first hole, which takes 13 ms
for 1 GiB of tmpfs. So a guest that has little to do has no links, and feels nothing after a pivot.
"""

from __future__ import annotations

import time
from collections.abc import Callable

REQUESTS, REQUESTS_S = 256, 0.1
"""A guest that sends so many requests in so much time is at work, and needs a link: each of its
requests costs half as much there."""

SURPLUS = 64
"""Guests need a link as well when so many more requests have found the connection in use than not:
then requests come at once, and mostly wait for something."""


class Demand:
    """What guests ask of the connection that they share. For any thread: a request that is counted
    twice or not at all does no harm."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is monotonic seconds."""
        self._clock = clock
        self._requests, self._since_s = 0, 0.0
        self._surplus = 0

    def grows(self, *, is_in_use: bool, is_detour: bool) -> bool:
        """A request begins. Returns whether a link should be opened. `is_in_use`: other requests
        are in flight. `is_detour`: the loop drives the connection, so that a thread waits for the
        loop as well; then a guest needs no hurry to get a link."""
        self._surplus = self._surplus + 1 if is_in_use else max(0, self._surplus - 1)
        self._requests += 1
        is_at_work = False
        if self._requests >= REQUESTS:
            now_s, since_s = self._clock(), self._since_s
            self._requests, self._since_s = 0, now_s
            is_at_work = is_detour or now_s - since_s <= REQUESTS_S
        if not is_at_work and self._surplus < SURPLUS:
            return False
        self._surplus = 0
        return True
