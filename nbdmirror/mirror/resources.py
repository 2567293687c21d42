"""What a mirror job needs of its target and of its server. Called on the loop's thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nbdmirror.devices.base import AsyncTarget, BlockDevice, Done
from nbdmirror.mirror.options import Ending, MirrorOptions


class Target(BlockDevice, AsyncTarget, Protocol):
    """What the job needs of its target beside the copying."""

    def give_up(self) -> None:
        """Give up the connection: its requests in flight fail."""

    def is_server_there(self) -> bool:
        """Whether the server greets another client. Blocks; for a helper thread."""


@dataclass(frozen=True, slots=True)
class JobState:
    """What the next process needs to continue the job, beside the dirty bitmap."""

    options: MirrorOptions
    """The present options."""
    is_scanned: bool
    is_paused: bool
    """Paused by the user, not by an error."""


class MirrorResources(Protocol):
    """What one job runs on, and what is saved of the job. `done` is called on the loop's thread,
    with an error or None."""

    def changed(self, state: JobState) -> None:
        """The job's state may have changed: save it."""

    def check_end(self, ending: Ending, done: Done) -> None:
        """The job is about to end well: whether the target can be what `ending` makes of it. May
        ask another server."""

    def prepare(self, ending: Ending, done: Done) -> None:
        """After `check_end`: do slow work now, so that `commit` is quick. `commit` takes no longer
        than this, where both meet the same load."""

    def commit(self, done: Done) -> None:
        """Record that the job ends well. `done` without an error: the record is on disk."""

    def uncommit(self, done: Done) -> None:
        """Revoke `commit`: the job continues, and reports its state. `done` is called within a
        bound; until then guests' writes are held."""

    def forget(self, done: Done) -> None:
        """Record that the job ends badly. `done` is called within a bound."""

    def pivot(self) -> None:
        """Guest writes are held and the target is level: serve the disk from the target."""

    def released(self) -> None:
        """The job does not use source and target any more; after a pivot the old source may be
        closed."""

    def dismissed(self) -> None:
        """Remove the job from all lists."""

    def scan(self, done: Done) -> None:
        """Mark as dirty what the source's top layer holds (sync=top), or what is not zero
        (target-is-zero)."""

    def reconnect_source(self, done: Done) -> None:
        """Reconnect a lost source, for as long as guests' requests wait for it. If the source is
        not lost, `done` is called at once. The error is never DeviceLost."""

    def reconnect(self, has_copied: bool, done: Done) -> None:
        """Reconnect a lost target, for its reconnect-delay. Then data that was not flushed is dirty
        again. If the target is not lost, `done` is called at once; but if the job has copied
        nothing yet (`has_copied`), the target is first checked for a way back to the disk. The
        error is never DeviceLost."""
