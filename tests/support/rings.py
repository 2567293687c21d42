"""Journals that are smaller than the product makes any, so that they are full after few points."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from nbdmirror.points import format as journal_format
from nbdmirror.points import ownership


@contextmanager
def rings_of(ring_bytes: int) -> Iterator[None]:
    """Within this, a journal may have a ring of so few bytes."""
    with (
        patch.object(journal_format, "RING_BYTES_MIN", ring_bytes),
        patch.object(ownership, "RING_BYTES_MIN", ring_bytes),
    ):
        yield
