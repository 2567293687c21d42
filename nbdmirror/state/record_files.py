"""RecordFiles: NAME.json and NAME.pivoted of one disk, which are written together.

On the writer's thread. All calls raise OSError.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdmirror.state.disk_record import DiskRecord
from nbdmirror.state.recovery import PivotRecord
from nbdmirror.state.sealed_files import Folder


@dataclass(slots=True)
class Ending:
    """The end of a mirror that is to be recorded."""

    definition: DiskRecord | None
    pivoted: PivotRecord | None = None
    is_prepared: bool = False


class RecordFiles:
    """`files`: recovery.names of the disk. A definition that is None: there is no mirror and no
    bitmap, and so no file."""

    def __init__(self, folder: Folder, files: dict[str, str]) -> None:
        self._folder = folder
        self._files = files

    def write(self, definition: DiskRecord | None) -> None:
        """Write the definition; the record of a pivot stays."""
        self.prepare(definition, None)
        self.commit(definition, None)

    def write_both(self, definition: DiskRecord | None, pivoted: PivotRecord | None) -> None:
        """Write both. If `pivoted` is None, there was no pivot."""
        self.prepare(definition, pivoted)
        if pivoted is None:
            self._folder.commit([], [self._files["pivoted"]])
        self.commit(definition, pivoted)

    def prepare(self, definition: DiskRecord | None, pivoted: PivotRecord | None) -> None:
        """Do what takes time of `commit`."""
        if pivoted is not None:
            self._folder.prepare(self._files["pivoted"], pivoted.to_bytes())
        if definition is not None:
            self._folder.prepare(self._files["definition"], definition.to_bytes())

    def commit(self, definition: DiskRecord | None, pivoted: PivotRecord | None) -> None:
        """Commit the pivot first: it says where the disk is, whatever the other file says."""
        names = [self._files["pivoted"]] if pivoted is not None else []
        if definition is not None:
            self._folder.commit([*names, self._files["definition"]])
        else:
            self._folder.commit(names, [self._files["definition"], self._files["bitmaps"]])
