"""A guest that lives through crashes, and knows what the disk may hold then (sectors.py).

`Witness` is the guest: threads with a connection and a zone each, which wait for their server when
it goes away, and then look at all they know.
"""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import nbd
from faults.sectors import SECTOR, Sectors
from support.images import KiB
from support.waiting import WAIT_S_MAX, wait_until

LENGTH_MAX = 32 * KiB
REJOIN_S = 0.02
"""Between attempts to connect again."""


@dataclass(slots=True)
class _Zone:
    start: int
    sectors: Sectors
    noise: random.Random
    thread: threading.Thread | None = None
    handle: nbd.NBD | None = None
    connection: socket.socket | None = None
    """The handle's, which cannot be asked for it while a request is under way."""
    is_in_doubt: bool = False
    """Its connection was lost, a request failed, or a flush said that something may be lost."""
    is_parked: bool = False

    def leave(self) -> None:
        """The connection has ended."""
        self.handle = None
        if self.connection is not None:
            self.connection.close()
            self.connection = None


@dataclass
class Witness:
    """Threads that write, zero, trim, flush and read, seeded. `zones`: (start, length) of each.

    `is_kept` becomes false before a storage that holds the disk loses what was not flushed. Errors
    are failures, but for a flush that tells of writes that may be lost if `allows_lost_flush`, and
    for a lost connection while `allows_lost_connection`.
    """

    uri: str
    initial: bytes
    zones: list[tuple[int, int]]
    seed: int
    pause_s: float = 0.001
    is_kept: bool = True
    allows_lost_flush: bool = False
    allows_lost_connection: bool = False
    requests: int = 0
    read_bytes: int = 0
    """And compared with what may be there."""
    touched: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of the disk that were asked to be changed, since it was last cleared."""
    lost_flushes: int = 0

    def __post_init__(self) -> None:
        self._failure: BaseException | None = None
        self._stopping = threading.Event()
        self._running = threading.Event()
        self._flushing = threading.Lock()  # one at a time: it tells one of them what was lost
        self._zones = [
            _Zone(start, Sectors(self.initial[start : start + length]), random.Random(seed))
            for (start, length), seed in zip(
                self.zones, range(self.seed * 1000, self.seed * 1000 + 1000), strict=False
            )
        ]

    def start(self) -> Self:
        self._running.set()
        for zone in self._zones:
            zone.thread = threading.Thread(
                target=self._run, args=(zone,), name=f"witness{zone.start}", daemon=True
            )
            zone.thread.start()
        return self

    def stop(self) -> None:
        """Raises what went wrong in its threads."""
        self._stopping.set()
        self._running.set()
        for zone in self._zones:
            if zone.thread is not None and zone.thread.is_alive():
                zone.thread.join(WAIT_S_MAX)
                assert not zone.thread.is_alive(), "a guest's request does not return"
        self.check()

    def abandon(self) -> None:
        self._stopping.set()
        self._running.set()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def pause(self) -> None:
        """No request is under way when this returns; not answered ones aside."""
        self._running.clear()
        wait_until(
            lambda: all(zone.is_parked for zone in self._zones) or self._failure, "the guest rests"
        )
        self.check()

    def resume(self) -> None:
        self._running.set()

    def wait_for_requests(self, number: int, timeout_s: float = WAIT_S_MAX) -> None:
        goal = self.requests + number
        wait_until(
            lambda: self.requests >= goal or self._failure, f"{number} guest requests", timeout_s
        )
        self.check()

    def forget_connections(self) -> None:
        """The server has ended; the guest is paused, and may not have noticed."""
        for zone in self._zones:
            zone.is_in_doubt = True
            zone.leave()

    def vanish(self) -> None:
        """As the kernel ends the connections of a process that was killed, with requests under way.
        Then another guest, which is paused, knows what this one did."""
        self._running.clear()
        for zone in self._zones:
            if (connection := zone.connection) is not None:
                with suppress(OSError):  # the server was first
                    connection.shutdown(socket.SHUT_RDWR)
        self.pause()
        self.forget_connections()

    def settle(self) -> None:
        """Look at all zones, of a disk that may have crashed; the guest is paused."""
        for zone in self._zones:
            if zone.handle is None:
                self._connect(zone)
            self._look(zone)

    def take_for_flushed(self) -> None:
        """The guest is paused and settled: flush, so that all it knows is certain."""
        for zone in self._zones:
            assert zone.handle is not None
            try:
                zone.handle.flush()
            except nbd.Error:
                if not self.allows_lost_flush:
                    raise
                self.lost_flushes += 1
                zone.handle.flush()
            zone.sectors.flush()

    def content(self) -> bytes:
        """What the whole disk must hold; paused and settled."""
        content = bytearray(self.initial)
        for zone in self._zones:
            content[zone.start : zone.start + len(zone.sectors)] = zone.sectors.content()
        return bytes(content)

    # The threads.

    def _run(self, zone: _Zone) -> None:
        try:
            while not self._stopping.is_set():
                if not self._running.is_set():
                    zone.is_parked = True
                    self._running.wait()
                    zone.is_parked = False
                    continue
                if zone.handle is None and not self._joins(zone):
                    continue
                self._step(zone)
        except BaseException as error:  # noqa: BLE001 - raised again in the test
            self._failure = self._failure or error
        finally:
            zone.is_parked = True
            if zone.handle is not None and zone.handle.aio_is_ready():
                with suppress(nbd.Error):
                    zone.handle.shutdown()
            zone.leave()

    def _joins(self, zone: _Zone) -> bool:
        """Connect, if the server is there."""
        try:
            self._connect(zone)
        except nbd.Error:
            if not self.allows_lost_connection:
                raise
            self._stopping.wait(REJOIN_S)
            return False
        return True

    def _connect(self, zone: _Zone) -> None:
        handle = nbd.NBD()
        handle.set_strict_mode(0)
        handle.connect_uri(self.uri)
        zone.handle = handle
        zone.connection = socket.socket(fileno=os.dup(handle.aio_get_fd()))

    def _step(self, zone: _Zone) -> None:
        try:
            if zone.is_in_doubt:
                self._look(zone)
            else:
                self._request(zone)
        except nbd.Error as error:
            zone.is_in_doubt = True
            assert zone.handle is not None
            if zone.handle.aio_is_ready():
                raise
            zone.leave()
            if not self.allows_lost_connection:
                raise AssertionError(f"the guest's connection broke: {error}") from error
            self._stopping.wait(REJOIN_S)
            return
        self.requests += 1
        if self.pause_s:
            self._stopping.wait(self.pause_s)

    def _look(self, zone: _Zone) -> None:
        assert zone.handle is not None
        found = bytes(zone.handle.pread(len(zone.sectors), zone.start))
        zone.sectors.settle(found, is_kept=self.is_kept)
        self.read_bytes += len(found)
        zone.is_in_doubt = False

    def _request(self, zone: _Zone) -> None:
        noise, handle, sectors = zone.noise, zone.handle, zone.sectors
        assert handle is not None
        length = noise.choice((1, 8, 8, noise.randint(1, LENGTH_MAX // SECTOR))) * SECTOR
        offset = noise.randrange(0, len(sectors) - length + SECTOR, SECTOR)
        at, kind = zone.start + offset, noise.random()
        durably = noise.random() < 0.1
        fua = nbd.CMD_FLAG_FUA if durably else 0
        if kind < 0.62:
            data = noise.randbytes(length)
            self._change(zone, offset, data, lambda: handle.pwrite(data, at, fua), durably)
        elif kind < 0.72:
            flags = fua | (nbd.CMD_FLAG_NO_HOLE if noise.random() < 0.5 else 0)
            self._change(
                zone, offset, bytes(length), lambda: handle.zero(length, at, flags), durably
            )
        elif kind < 0.75:
            self._trim(zone, offset, length)
        elif kind < 0.85:
            self._flush(zone)
        else:
            sectors.check(offset, bytes(handle.pread(length, at)), is_kept=self.is_kept)
            self.read_bytes += length

    def _change(
        self, zone: _Zone, offset: int, data: bytes, request: Callable[[], None], durably: bool
    ) -> None:
        self.touched.append((zone.start + offset, len(data)))
        zone.sectors.ask(offset, data)
        request()
        zone.sectors.acknowledge(offset, data, durably=durably)

    def _trim(self, zone: _Zone, offset: int, length: int) -> None:
        """What it holds then is the server's choice, made once, if the whole sector is trimmed:
        what it held, or zeroes."""
        handle, at = zone.handle, zone.start + offset
        assert handle is not None
        self.touched.append((at, length))
        before = bytes(handle.pread(length, at))
        zone.sectors.check(offset, before, is_kept=self.is_kept)
        zone.sectors.ask(offset, before)
        zone.sectors.ask(offset, bytes(length))
        handle.trim(length, at)
        found = bytes(handle.pread(length, at))
        zone.sectors.check(offset, found, is_kept=self.is_kept)
        zone.sectors.acknowledge(offset, found, durably=False)

    def _flush(self, zone: _Zone) -> None:
        assert zone.handle is not None
        with self._flushing:
            if zone.is_in_doubt:
                return
            try:
                zone.handle.flush()
            except nbd.Error:
                # It is told once, to one of them: nobody's writes are certain.
                for other in self._zones:
                    other.is_in_doubt = True
                self.lost_flushes += 1
                if not self.allows_lost_flush or not zone.handle.aio_is_ready():
                    raise
                return
            zone.sectors.flush()
