"""Block status: the extents that an NBD server reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nbd

from nbdmirror.devices.base import Extent
from nbdmirror.nbdclient.handshake import DEPTH_CONTEXT

LENGTH_MAX = (2 << 30) - (64 << 20)
"""Longest request to zero, to trim or for block status: below 2 GiB, which servers with signed
lengths accept, and a multiple of every granularity."""

EXTENTS_MAX = 1 << 16
"""Extents of one answer that are used; the rest is queried again. With extents of one byte the
largest answer would take gigabytes."""

Pairs = list[tuple[int, int]]
"""Lengths in bytes, and flags."""


def status_method(
    handle: nbd.NBD, collect: Callable[[str, Pairs], None], *, is_wide: bool
) -> tuple[Callable[..., int], Callable[..., int]]:
    """`aio_block_status` for this connection, and its callback, which calls `collect` with the name
    of a meta context and its entries."""
    if is_wide:

        def take(context: str, offset: int, entries: Pairs, error: Any) -> int:
            collect(context, entries)
            return 0

        return handle.aio_block_status_64, take

    def take_flat(context: str, offset: int, entries: list[int], error: Any) -> int:
        collect(context, list(zip(entries[::2], entries[1::2], strict=True)))
        return 0

    return handle.aio_block_status, take_flat


def collector(
    found: list[Extent], length: int, wanted: str = nbd.CONTEXT_BASE_ALLOCATION
) -> Callable[[str, Pairs], None]:
    """A callback that fills `found` with one meta context, cut at `length` bytes. Servers may
    report more than was asked for, or less."""

    def collect(context: str, entries: Pairs) -> None:
        left = length - sum(extent.length for extent in found)
        if context != wanted or len(found) >= EXTENTS_MAX:
            return
        for span, flags in entries:
            kept = min(span, left)
            if kept and wanted == DEPTH_CONTEXT:
                found.append(Extent(kept, zero=False, hole=flags != 1))
            elif kept:
                zero, hole = bool(flags & nbd.STATE_ZERO), bool(flags & nbd.STATE_HOLE)
                found.append(Extent(kept, zero, hole))
            left -= kept
            if len(found) >= EXTENTS_MAX:
                break

    return collect
