"""NbdDevice: an NBD export, through libnbd. Blocking calls for guest threads, asynchronous ones
for the copier, on the same connections (shared_connection.py explains how they share)."""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Callable
from typing import Self

import nbd

from nbdmirror.devices.base import (
    AsyncSource,
    AsyncTarget,
    BlockDevice,
    BlockSize,
    Buffer,
    Done,
    Extent,
    ExtentsDone,
    pieces,
)
from nbdmirror.errors import ConfigError, DeviceError, DeviceLost
from nbdmirror.identity import Same, SocketFile, same_place
from nbdmirror.layers import Layer, layers_of
from nbdmirror.nbd_uri import parse
from nbdmirror.nbdclient import tls
from nbdmirror.nbdclient.block_status import LENGTH_MAX, collector, status_method
from nbdmirror.nbdclient.handshake import DEPTH_CONTEXT, ExportInfo
from nbdmirror.nbdclient.pool import CONNECT_TIMEOUT_S, AnyConnection, ConnectionPool
from nbdmirror.nbdclient.request import Parts
from nbdmirror.nbdclient.reservations import release
from nbdmirror.nbdclient.shared_connection import SharedConnection
from nbdmirror.nbdclient.zeroing import Zeroing

log = logging.getLogger(__name__)

LOSSES_MAX = 5
"""How often a request may be lost with its connection before it fails: a request that ends its
server each time must not be repeated for ever."""


class NbdDevice(BlockDevice, AsyncSource, AsyncTarget):
    """An NBD export as a disk. `announced` is the server's answer at the handshake.

    A guest's request that was in flight on a lost connection is done again on a new one: a second
    write of the same bytes to the same place does no harm. Data that the server had acknowledged
    and not flushed may be lost, so the next flush fails.
    """

    def __init__(
        self,
        uri: str,
        first: SharedConnection,
        announced: ExportInfo,
        *,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """`timeout_s`: for each handshake."""
        self.uri = self.description = uri
        self.announced = announced
        self.size = announced.size
        self.read_only = announced.read_only
        self.block_size = BlockSize(
            announced.minimum, announced.preferred or 4096, announced.maximum
        )
        revived = self._connected_again
        self.pool = ConnectionPool(
            uri, first, announced, on_reconnected=revived, timeout_s=timeout_s
        )
        self.on_lost_writes: Callable[[], None] | None = None
        """Called, from any thread, when acknowledged changes may be lost."""
        self._numbers = itertools.count(1)
        self._changed = 0
        """Number of the last acknowledged change, or of one of the last."""
        self._flushed = 0
        """All changes up to this number were acknowledged before a flush that succeeded."""
        self._losses = 0
        """How often acknowledged changes may have been lost."""
        self._losses_told = 0
        self._zeroing = Zeroing(self)

    @classmethod
    def open(cls, uri: str, *, timeout_s: float = CONNECT_TIMEOUT_S, mirrors: bool = False) -> Self:
        """Connect to `uri` (nbd://, nbds://, nbd+unix://, ...) within `timeout_s`. Raises
        ConfigError. `mirrors`: the export is a mirror's target."""
        for warning in tls.exposed_keys(uri):
            log.warning("%s", warning)
        connection = SharedConnection.open(uri, timeout_s, to_mirror=mirrors)
        try:
            announced = ExportInfo.of(connection.handle, uri)
            return cls(uri, connection, announced, timeout_s=timeout_s)
        except ConfigError:
            connection.close()
            raise

    # Blocking, from any thread.

    def pread(self, buf: memoryview, offset: int) -> None:
        for start, length in pieces(0, len(buf), self.block_size.maximum):
            part = buf[start : start + length]
            link = self.pool.pick()
            try:
                link.read(part, offset + start)
            except DeviceLost:
                self._again(link, lambda link, at, part=part: link.read(part, at), offset + start)

    def read_by(self, connection: SharedConnection) -> Callable[[memoryview, int], None]:
        """To read by a connection that is not in use yet, in requests that the server takes."""

        def read(buf: memoryview, offset: int) -> None:
            for start, length in pieces(0, len(buf), self.block_size.maximum):
                connection.read(buf[start : start + length], offset + start)

        return read

    def pwrite(self, buf: Buffer, offset: int, fua: bool = False) -> None:
        if self.read_only:
            self._refuse_if_read_only()
        if not 0 < len(buf) <= self.block_size.maximum:
            view = memoryview(buf)
            for start, length in pieces(0, len(buf), self.block_size.maximum):
                self.pwrite(view[start : start + length], offset + start, fua)
            return
        flags = nbd.CMD_FLAG_FUA if fua and self.announced.can_fua else 0
        link = self.pool.pick()
        try:
            link.write(buf, offset, flags)
        except DeviceLost:
            link = self._again(link, lambda link, at: link.write(buf, at, flags), offset)
        if not flags:
            self._changed = next(self._numbers)
            if link.generation != self.pool.generation:
                self._change(lambda link, at: link.write(buf, at), offset)
            if fua:
                self.flush()

    def zero(
        self,
        offset: int,
        length: int,
        *,
        may_trim: bool = False,
        fua: bool = False,
        fast: bool = False,
    ) -> None:
        self._refuse_if_read_only()
        part = offset, length
        self._zeroing.zero(self._change, part, may_trim=may_trim, fua=fua, fast=fast)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        self._refuse_if_read_only()
        self._zeroing.trim(self._change, (offset, length), fua=fua)

    def flush(self) -> None:
        """Fails once if a lost connection may have lost unflushed writes. All flushes in progress
        at that time fail."""
        told = self._losses_told
        self._flush()
        if (losses := self._losses) > told:
            self._losses_told = losses
            raise self._lost_writes()

    def sync(self) -> None:
        self._flush()
        if self._losses > self._losses_told:
            raise self._lost_writes()

    def _lost_writes(self) -> DeviceError:
        return DeviceError(f"{self.uri}: the connection was lost with writes not flushed")

    def _flush(self) -> None:
        if self.announced.can_flush:
            changed = self._changed
            self._ask(lambda link: link.flush())
            # Not earlier: a loss during the flush is a loss of data that it should have covered.
            self._flushed = max(self._flushed, changed)

    def extents(self, offset: int, length: int) -> list[Extent]:
        if not self.announced.can_extents or not length:
            return [Extent(length, zero=False, hole=False)]
        span = min(length, LENGTH_MAX)
        try:
            found = self._extents(offset, span)
        except DeviceLost:
            found = self._extents(offset, span)
        return found or [Extent(length, zero=False, hole=False)]

    def cache(self, offset: int, length: int) -> None:
        if self.announced.can_cache:
            self._ask(lambda link: link.cache(length, offset))

    def _extents(self, offset: int, length: int) -> list[Extent]:
        found: list[Extent] = []
        connection = self.pool.pick_shared()
        collect = collector(found, length)
        status, take = status_method(connection.handle, collect, is_wide=connection.is_wide)
        connection.call(status, length, offset, take)
        return found

    def _connected_again(self) -> None:
        """Called by the reconnecting thread. A change that is acknowledged at this moment, and not
        yet in `_changed`, sees that the pool's generation has changed (`_change`)."""
        if self._changed > self._flushed:
            self._lose_writes()

    def _change(self, request: Callable[..., None], *arguments: int) -> None:
        """Do a change. If a connection from before the last loss acknowledges it, do it again: the
        server may be another one now. The old request has ended, and cannot come late."""
        link = self._ask(request, *arguments)
        self._changed = next(self._numbers)
        if link.generation != self.pool.generation:
            self._change(request, *arguments)

    def _lose_writes(self) -> None:
        self._losses += 1
        on_lost_writes = self.on_lost_writes  # a mirror that ends resets it meanwhile
        if on_lost_writes is not None:
            on_lost_writes()

    def _ask(self, request: Callable[..., None], *arguments: int) -> AnyConnection:
        """Do a request. Returns the connection that answered."""
        link = self.pool.pick()
        try:
            request(link, *arguments)
        except DeviceLost:
            return self._again(link, request, *arguments)
        return link

    def _again(
        self, link: AnyConnection, request: Callable[..., None], *arguments: int
    ) -> AnyConnection:
        """Repeat a request that was lost with `link`, on connections that wait for the server.
        Several connections that broke together count as one loss."""
        losses = 1
        while True:
            before, link = link, self.pool.pick()
            losses += link.generation != before.generation
            try:
                request(link, *arguments)
            except DeviceLost:
                if losses > LOSSES_MAX:
                    raise
            else:
                return link

    def close(self) -> None:
        release(self)
        self.pool.close()

    def is_server_there(self) -> bool:
        """Whether the server greets another client. Blocks, within a bound."""
        return self.pool.is_server_there()

    def give_up(self) -> None:
        """On the loop's thread, attached: all requests in flight fail at once, as if lost."""
        self.pool.give_up()

    @property
    def is_lost(self) -> bool:
        """A connection is broken or closed, or its server ends."""
        return self.pool.is_lost

    def is_same_export(self, other: NbdDevice) -> bool:
        """Whether both are the same export of the same server (rule 44)."""
        one, another = self.pool.shared.peer, other.pool.shared.peer
        if one is None or another is None:
            return same_place(self.uri, other.uri, looks=False) is Same.YES
        return one.same(another) is Same.YES

    def is_named(self, uri: str, file: SocketFile | None) -> bool:
        """Whether `uri`, whose Unix socket is `file`, surely names this export. Waits for
        nothing."""
        peer = self.pool.shared.peer
        if peer is not None and peer.server == file:
            return parse(uri).export == parse(self.uri).export
        return same_place(self.uri, uri, looks=False) is Same.YES

    def is_own_export(self) -> bool:
        """Whether the server at the other end is this very process (rule 44)."""
        peer = self.pool.shared.peer
        return peer is not None and peer.is_this_process

    @property
    def place(self) -> tuple[str, list[Layer]]:
        """The URI, with the address that was reached in place of a name; and the storage that the
        export is made of, if that is certain, else nothing."""
        peer = self.pool.shared.peer
        if peer is None:
            return self.uri, []
        storage = peer.storage
        return peer.reached(self.uri), [] if storage is None else storage.layers

    def is_of_file(self, opened: os.stat_result) -> bool:
        """Whether the server is a process of this host that writes to a file or device with this
        status."""
        peer = self.pool.shared.peer
        return peer is not None and peer.writes_to(layers_of(opened))

    # Asynchronous, on the loop's thread, while `pool` is attached to the loop.

    def start_read(self, buf: memoryview, offset: int, done: Done, *, whole: bool = False) -> None:
        """`whole`: the server must read all of the range, instead of leaving holes out."""
        connection, parts = self.pool.shared, Parts(self.uri, len(buf))
        flags = nbd.CMD_FLAG_DF if whole and connection.can_df else 0
        read, then = connection.handle.aio_pread_structured, parts.check(done)
        connection.start(read, buf, offset, parts, flags=flags, done=then)

    def start_write(self, buf: memoryview, offset: int, done: Done) -> None:
        connection = self.pool.shared
        connection.start(connection.handle.aio_pwrite, buf, offset, done=done)

    def start_zero(self, offset: int, length: int, may_trim: bool, done: Done) -> None:
        self._zeroing.start(offset, length, may_trim, done)

    def start_flush(self, done: Done) -> None:
        connection = self.pool.shared
        changed = self._changed

        def finish(error: BaseException | None) -> None:
            if error is None:
                self._flushed = max(self._flushed, changed)
            done(error)

        connection.start(connection.handle.aio_flush, done=finish)

    def start_extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        if not self.announced.can_extents:
            done([Extent(length, zero=False, hole=False)], None)
            return
        self._start_status(offset, length, nbd.CONTEXT_BASE_ALLOCATION, done)

    def start_top_layer(self, offset: int, length: int, done: ExtentsDone) -> None:
        """As `start_extents`; a hole is a range that the image's top layer does not hold."""
        self._start_status(offset, length, DEPTH_CONTEXT, done)

    def _start_status(self, offset: int, length: int, context: str, done: ExtentsDone) -> None:
        connection = self.pool.shared
        found: list[Extent] = []
        span = length if connection.is_wide else min(length, LENGTH_MAX)

        def finish(error: BaseException | None) -> None:
            done(None if error else found, error)

        collect = collector(found, span, context)
        status, take = status_method(connection.handle, collect, is_wide=connection.is_wide)
        connection.start(status, span, offset, take, done=finish)

    def _refuse_if_read_only(self) -> None:
        if self.read_only:
            raise DeviceError(f"{self.uri}: is read-only", errno.EROFS)
