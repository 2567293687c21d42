"""StateDirectory: the saved state of all disks, checked when a server starts.

A disk that must not be served is refused here: before nbdkit forks, so that the user sees the
error."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from nbdmirror.errors import ConfigError
from nbdmirror.identity import Same, same_place
from nbdmirror.layers import Layer
from nbdmirror.nbdclient.sides import Side, look
from nbdmirror.state.disk_file import DiskIdentity
from nbdmirror.state.disk_record import DiskRecord
from nbdmirror.state.intent_log import DISK_BYTES_MAX, SLOTS, disk_ids, slot_bytes
from nbdmirror.state.pivots import forget
from nbdmirror.state.recovery import (
    OTHER_VERSION,
    OtherDisk,
    PivotRecord,
    RecoveredState,
    check_formats,
    last_size,
    names,
    record_id,
    recover,
)
from nbdmirror.state.sealed_files import (
    DiskFolder,
    Folder,
    Slots,
    StateError,
    UnknownFormat,
    new_name,
)
from nbdmirror.state.shared_memory import discard_left
from nbdmirror.state.store import DiskStore
from nbdmirror.subject_log import disk_log

log = logging.getLogger(__name__)


_SERVE = "; serve that, or start with"
_NOT_HEARD = (
    "the server there does not know that, and has the disk as a target only: end that server, and "
    "start it with the --accept-old-side that its refusal shows"
)


class StateDirectory:
    """The state directory of one server. For the start, before other threads exist."""

    def __init__(self, path: str, *, accepted: Collection[str], read_only: bool = False) -> None:
        """`accepted`: IDs of records of pivots (`record_id`) that are removed. Raises
        ConfigError."""
        self._read_only = read_only
        self._folder: Folder = DiskFolder(Path(path))
        self._accepted = accepted
        self._disks: dict[tuple[int, int], str] = {}
        """The disk of each log of intents, by its device and inode."""

    def check_formats(self, disks: Iterable[str]) -> None:
        """Raise ConfigError if a file of these disks needs another nbdmirror: this one would lose
        its content. Call this before `open`, which changes files."""
        for name in disks:
            try:
                check_formats(self._folder, name)
            except UnknownFormat as error:
                raise ConfigError(f"{self._folder.path}/{error}") from error
            except OSError as error:
                text = f"state-dir: {self._folder.path}: {error.strerror}"
                raise ConfigError(text) from error

    def open(
        self, name: str, source: str, size: int, *, reached: str = "", below: Sequence[Layer] = ()
    ) -> DiskStore:
        """The store of the disk `name`. `source`: its path or URI; `size`: bytes of its device;
        `reached`: the URI with the address that was reached; `below`: what the export is made of,
        if that is certain. Raises ConfigError if the disk must not be served, or if its state
        cannot be saved."""
        identity = DiskIdentity.of(source, size)
        files = names(name)
        where = self._folder.path
        try:
            self._check_other_disks(name, identity, list(below))
            self._doubt_other_names(name, identity)
            pivoted = self._check_side(name, identity, reached or source)
            is_target_only = pivoted is not None and pivoted.is_left(identity)
            found = None
            if not is_target_only:
                if pivoted is not None:
                    # The name that all files have.
                    identity = replace(identity, source=pivoted.truth)
                identity = replace(identity, size=self._size(name, identity, pivoted))
                found = self._examine(name, identity, pivoted)
            if (size := identity.size) > DISK_BYTES_MAX:
                text = f"has {size} bytes: with a state directory it may have {DISK_BYTES_MAX}"
                raise ConfigError(f"state-dir: disk {name} {text} (1 PiB)")
            slots = self._folder.slots(files["intents"], slot_bytes(size), SLOTS)
            status = os.stat(where / files["intents"])
            self._take_away_what_is_left(files, slots, found)
        except OSError as error:
            raise ConfigError(f"state-dir: {where}: {error.strerror}") from error
        other = self._disks.setdefault((status.st_dev, status.st_ino), name)
        if other != name:
            raise ConfigError(
                f"state-dir: {where}: disks {other} and {name} would share a file there, since "
                f"its file system ignores upper and lower case: rename one of them"
            )
        return DiskStore(
            name=name,
            identity=identity,
            folder=self._folder,
            slots=slots,
            found=found,
            pivoted=pivoted,
            is_target_only=is_target_only,
        )

    def _take_away_what_is_left(
        self, files: dict[str, str], slots: Slots, found: RecoveredState | None
    ) -> None:
        """Remove what a killed server has left: prepared files, and, if nothing of it is used, its
        memory."""
        self._folder.commit([], [new_name(file) for file in files.values()])
        if found is None:
            for disk_id in disk_ids(slots):
                discard_left(disk_id)

    def _check_other_disks(self, name: str, identity: DiskIdentity, below: list[Layer]) -> None:
        """Raise ConfigError if `identity`, which is made of `below`, is the old side of another
        disk: it must not be served under another name either."""
        for path in sorted(self._folder.path.glob(names("*")["pivoted"])):
            other = path.name.removesuffix(names("")["pivoted"])
            content = self._folder.read(path.name)
            if other == name or content is None or record_id(content) in self._accepted:
                continue
            accept = f"start with --accept-old-side {record_id(content)}"
            try:
                pivoted = PivotRecord.from_bytes(content)
            except UnknownFormat as error:
                raise ConfigError(
                    f"{path}: {error}; {identity.source} may be the old side of the disk {other}: "
                    f"{OTHER_VERSION}, or {accept} if it is not"
                ) from error
            except StateError:
                continue  # which disk it was is not known
            if any(
                old.is_same(identity) or old.shares_storage(identity) or old.lies_on(below)
                for old in pivoted.left
            ):
                raise ConfigError(
                    f"{identity.source} is the old side of the disk {other}, which is served from "
                    f"{pivoted.truth} ({path}); serve that, or {accept} and lose what was written "
                    f"there"
                )

    def _doubt_other_names(self, name: str, identity: DiskIdentity) -> None:
        """If this disk had another name before, the state under that name misses guests' writes
        from now on: all of that disk counts as dirty."""
        for path in sorted(self._folder.path.glob(names("*")["definition"])):
            other = path.name.removesuffix(names("")["definition"])
            if other == name or self._read_only:
                continue
            try:
                definition = DiskRecord.from_bytes(self._folder.read(path.name) or b"")
            except StateError:
                continue  # which disk it was is not known
            before = definition.identity
            if before.is_same(identity) or before.shares_storage(identity):
                text = "%s was served as disk %s: all of disk %s counts as dirty now"
                disk_log(name).warning(text, identity.source, other, other)
                doubted = replace(definition, memory="", clean_mtime_ns=None)
                self._folder.prepare(path.name, doubted.to_bytes())
                self._folder.commit([path.name], [names(other)["bitmaps"]])
                discard_left(definition.disk_id, definition.memory)

    def _check_side(self, name: str, identity: DiskIdentity, reached: str) -> PivotRecord | None:
        """Raise ConfigError if `identity` is the disk's old side, or may be: old data under a
        running guest is worse than a refused start.

        For an old side the record is returned if it may start as a target only: no guest can come
        back to it, since its server ended in order, and the disk is where the record says."""
        file = names(name)["pivoted"]
        content = self._folder.read(file)
        if content is None:
            return None
        if record_id(content) in self._accepted:
            log.warning("%s: removed as requested: %s is the disk", file, identity.source)
            forget(self._folder, name, identity)
            return None
        path, accept = self._folder.path / file, f"--accept-old-side {record_id(content)}"
        try:
            pivoted = PivotRecord.from_bytes(content)
        except UnknownFormat as error:
            raise ConfigError(
                f"{path}: {error}; the disk was moved to another server, and this file says where: "
                f"{OTHER_VERSION}, or start with {accept} if {identity.source} is the disk"
            ) from error
        except StateError as error:
            raise ConfigError(
                f"{path}: {error}; the disk was moved to another server, and this file said where: "
                f"serve it from there, or start with {accept} if {identity.source} is the disk"
            ) from error
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(pivoted.time_s))
        where = f"since {when} it is served from {pivoted.truth} ({path}){_SERVE}"
        if pivoted.is_left(identity):
            found = look(pivoted.truth)
            side = found[0] if found is not None else None
            if pivoted.has_ended and not self._read_only and side is Side.DISK:
                return pivoted
            if side in (Side.TARGET, Side.WHOLE):
                where = f"{where[: -len(_SERVE)]}; {_NOT_HEARD}, or start this one with"
            raise ConfigError(
                f"{identity.source} is not the disk any more: {where} {accept} and lose what was "
                f"written there"
            )
        places = (identity.source, reached)  # a name may have several addresses
        if all(same_place(p, pivoted.truth, resolves=True) is not Same.YES for p in places):
            raise ConfigError(
                f"{identity.source}: may be the disk's old side: {where} "
                f"{accept} if {identity.source} is the disk"
            )
        return pivoted

    def _size(self, name: str, identity: DiskIdentity, pivoted: PivotRecord | None) -> int:
        """The disk's size in bytes. The disk keeps its size on a larger device: guests know that
        size, and a mirror home fits only with it. Raises ConfigError if the device is smaller: a
        part of the disk is missing, and a guest that repairs the rest would lose it."""
        if pivoted is None:
            return identity.size
        kept = pivoted.size or last_size(self._folder, name, identity.source)
        if kept > identity.size:
            files = names(name)
            raise ConfigError(
                f"{identity.source}: has {identity.size} bytes, and the disk has {kept}: its end is"
                f" missing; serve all of it, or, if the disk is to be smaller, first remove "
                f"{files['pivoted']} and {files['definition']} in {self._folder.path}"
            )
        elif 0 < kept < identity.size:
            text = "keeps its size of %d bytes, though %s has %d"
            disk_log(name).info(text, kept, identity.source, identity.size)
        return kept or identity.size

    def _examine(
        self, name: str, identity: DiskIdentity, pivoted: PivotRecord | None
    ) -> RecoveredState | None:
        """The state that can be used; a damaged definition is put aside."""
        path = self._folder.path
        try:
            found = recover(self._folder, name, identity, pivoted)
        except OtherDisk as error:
            raise ConfigError(
                f"{path}/{error}; give this disk another name, or another state-dir"
            ) from error
        except StateError as error:
            text = "%s/%s; the file is renamed, and mirrors and bitmaps start from the beginning"
            log.error(text, path, error)
            self._folder.refuse(names(name)["definition"])
            return None
        return found
