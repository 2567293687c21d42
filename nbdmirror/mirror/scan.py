"""Which parts of a source are copied, if not everything. On the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable

from nbdmirror.devices.base import Done, Extent, ExtentsDone
from nbdmirror.disk.bitmap import DirtyBitmap

Ask = Callable[[int, int, ExtentsDone], None]
"""`start_extents` of a source, or `start_top_layer`."""


def scan(
    ask: Ask,
    dirty: DirtyBitmap,
    *,
    is_copied: Callable[[Extent], bool],
    is_wanted: Callable[[], bool],
    done: Done,
) -> None:
    """Mark as dirty the extents for which `is_copied` is true. `ask` takes an offset and a length
    in bytes. The scan ends early, with `done` called, when `is_wanted` becomes false."""
    position = 0
    is_inside = is_done = False

    def then(extents: list[Extent] | None, error: BaseException | None) -> None:
        nonlocal position, is_done
        if error is not None or not is_wanted():
            is_done = True
            done(error)
            return
        for extent in extents or []:
            if is_copied(extent):
                dirty.mark(position, extent.length)
            position += extent.length
        if not is_inside:
            step()

    def step() -> None:
        """Query the next extents. An answer may come before `ask` returns: then no recursion."""
        nonlocal is_inside
        is_inside, before = True, -1
        while before < position < dirty.size and not is_done:
            before = position
            ask(position, dirty.size - position, then)
        is_inside = False
        if position >= dirty.size and not is_done:
            done(None)

    step()


def is_not_zero(extent: Extent) -> bool:
    """For target-is-zero: copy what does not read as zeroes."""
    return not extent.zero


def is_no_hole(extent: Extent) -> bool:
    """For sync=top: copy what the top layer holds."""
    return not extent.hole
