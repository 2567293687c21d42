"""A guest that knows what its disk holds: it writes and verifies all the while."""

from __future__ import annotations

import random
import threading
import time
from typing import Any, Self

import nbd
from support.clients import connected
from support.images import CHUNK_BYTES, Content, chunks
from support.waiting import WAIT_S_MAX, wait_until

PAUSE_S_MAX = 0.02


class Guest:
    """Writers that know what the disk holds: threads, each with a connection and a zone of its own.

    Seeded; writes (FUA and not), zeroes (hole or not), trims, flushes and reads, at odd places. A
    read that is not what was written, and any error, fails the test at `stop`. `model` is what the
    disk must hold then. There is a request each `pause_s`, of all threads together, and each pauses
    for twice the time that its last request took. There is no pause at all if `pause_s` is 0.
    """

    def __init__(
        self,
        uri: str,
        initial: Content,
        *,
        seed: int = 1,
        connections: int = 1,
        pause_s: float = 0.001,
        length_max: int = 70_000,
    ) -> None:
        self.model = bytearray().join(chunks(initial))
        self.requests = 0
        self.longest_s = 0.0
        self._uri = uri
        self._pause_s = pause_s * connections
        self._length_max = length_max
        self._failure: BaseException | None = None
        self._stopping = threading.Event()
        zone = len(self.model) // connections
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(seed * 1000 + n, n * zone, zone),
                daemon=True,
                name=f"guest{n}",
            )
            for n in range(connections)
        ]

    def start(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> Self:
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(WAIT_S_MAX)
                assert not thread.is_alive(), "a guest's request does not return"
        if self._failure is not None:
            raise self._failure
        return self

    def wait_for_requests(self, number: int, timeout_s: float = WAIT_S_MAX) -> None:
        """Until that many more are done: the guest lives."""
        goal = self.requests + number
        wait_until(
            lambda: self.requests >= goal or self._failure, f"{number} guest requests", timeout_s
        )
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.stop()
        else:
            self._stopping.set()

    def _run(self, seed: int, start: int, length: int) -> None:
        noise = random.Random(seed)
        try:
            with connected(self._uri) as handle:
                while not self._stopping.is_set():
                    began_s = time.monotonic()
                    self._request(handle, noise, start, length)
                    took_s = time.monotonic() - began_s
                    self.longest_s = max(self.longest_s, took_s)
                    self.requests += 1
                    if self._pause_s:
                        # Where requests take long a mirror does too: it must come to its end.
                        self._stopping.wait(max(self._pause_s, min(2 * took_s, PAUSE_S_MAX)))
                for at in range(start, start + length, CHUNK_BYTES):
                    self._verify(handle, at, min(CHUNK_BYTES, start + length - at))
                handle.flush()
        except BaseException as error:  # noqa: BLE001 - raised again by `stop`, in the test
            self._failure = error

    def _request(self, handle: nbd.NBD, noise: random.Random, start: int, zone: int) -> None:
        length = min(zone, noise.choice((1, 512, 4096, 4096, noise.randint(1, self._length_max))))
        offset = start + noise.randint(0, zone - length)
        kind = noise.random()
        fua = nbd.CMD_FLAG_FUA if noise.random() < 0.1 else 0
        if kind < 0.6:
            data = noise.randbytes(length)
            handle.pwrite(data, offset, fua)
            self.model[offset : offset + length] = data
        elif kind < 0.75:
            hole = nbd.CMD_FLAG_NO_HOLE if noise.random() < 0.5 else 0
            handle.zero(length, offset, fua | hole)
            self.model[offset : offset + length] = bytes(length)
        elif kind < 0.8:
            handle.trim(length, offset, fua)
            # What it holds now is the server's choice, made once.
            self.model[offset : offset + length] = handle.pread(length, offset)
        elif kind < 0.85:
            handle.flush()
        else:
            self._verify(handle, offset, length)

    def _verify(self, handle: nbd.NBD, offset: int, length: int) -> None:
        found = bytes(handle.pread(length, offset))
        assert found == self.model[offset : offset + length], f"{length} bytes at {offset}"
