"""Records about a disk's pivots beside the pivot itself: that the server ended in order, and that
the old side is the disk again."""

from __future__ import annotations

from dataclasses import replace

from nbdmirror.state.disk_file import DiskIdentity
from nbdmirror.state.disk_record import DiskRecord
from nbdmirror.state.recovery import PivotRecord, names
from nbdmirror.state.sealed_files import Folder, StateError


def note_end(
    folder: Folder, name: str, pivoted: PivotRecord | None, *, has_ended: bool
) -> PivotRecord | None:
    """Record whether the server that served the disk `name` from its new side has ended in order.
    Returns the new record. Raises OSError."""
    if pivoted is None or pivoted.has_ended == has_ended:
        return pivoted
    now, file = replace(pivoted, has_ended=has_ended), names(name)["pivoted"]
    folder.prepare(file, now.to_bytes())
    folder.commit([file])
    return now


def forget(folder: Folder, name: str, identity: DiskIdentity) -> DiskRecord | None:
    """Make the old side, `identity`, the disk again. The record of the pivot is removed last. A
    saved mirror is dropped, since it was a mirror of the other side. Persistent bitmaps stay, with
    everything dirty: returns their record, or None. Raises OSError."""
    files = names(name)
    kept, removed = [], [files["bitmaps"], files["pivoted"]]
    try:
        definition = DiskRecord.from_bytes(folder.read(files["definition"]) or b"")
    except StateError:
        definition = None  # put aside by `StateDirectory.open`
    if definition is not None and definition.bitmaps:
        definition = replace(definition, identity=identity, memory="", mirror=None)
        folder.prepare(files["definition"], definition.to_bytes())
        kept = [files["definition"]]
    elif definition is not None:
        removed.insert(0, files["definition"])
        definition = None
    folder.commit(kept, removed)
    return definition
