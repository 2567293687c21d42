"""What a mirror job asks of its target, and of what it is made of. Called on the loop's thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nbdmirror.devices.base import AsyncTarget, BlockDevice, Done
from nbdmirror.mirror.options import Ending, MirrorOptions


class Target(BlockDevice, AsyncTarget, Protocol):
    """What the job asks of its target beside the copying."""

    def give_up(self) -> None: ...

    def is_server_there(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class JobState:
    """What the next process needs to continue the job, beside what is dirty."""

    options: MirrorOptions
    """As they are now."""
    is_scanned: bool
    is_paused: bool
    """By the user."""


class MirrorResources(Protocol):
    """What one job runs on, and what of the job is to outlive the process."""

    def changed(self, state: JobState) -> None:
        """The job's state may have become another."""

    def prepare(self, ending: Ending, done: Done) -> None:
        """The job is about to end well: do what takes time now, so that `commit` is quick."""

    def commit(self, done: Done) -> None:
        """The job ends well now. `done` without an error means that this is on disk."""

    def uncommit(self) -> None:
        """Take `commit` back: the job continues, and reports its state."""

    def forget(self, done: Done) -> None:
        """The job ends otherwise. `done` is called within a bound."""

    def pivot(self) -> None:
        """Guest writes are held and the target is level: serve the disk from the target."""

    def released(self) -> None:
        """The job uses source and target no more; after a pivot the old source is free to be
        closed."""

    def dismissed(self) -> None:
        """The job is to be forgotten."""

    def scan(self, done: Done) -> None:
        """Mark dirty what the source's top layer holds (sync=top), or what is not zero
        (target-is-zero)."""

    def reconnect_source(self, done: Done) -> None:
        """Bring a lost source back, trying for as long as guests' requests wait for it; if it is
        not lost, `done` is called at once. An error is no DeviceLost."""

    def reconnect(self, has_copied: bool, done: Done) -> None:
        """Bring a lost target back, trying for its reconnect-delay. What was not flushed is dirty
        then. If it is not lost, `done` is called at once; but unless the job `has_copied`
        something, the target is first looked at for a way back to the disk. An error is no
        DeviceLost."""
