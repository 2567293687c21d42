"""What a mirror job asks of its target, and of whoever made it. Called on the loop's thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from nbdmirror.devices.base import AsyncTarget, BlockDevice, Done

if TYPE_CHECKING:
    from nbdmirror.mirror.mirror_job import MirrorJob


class Target(BlockDevice, AsyncTarget, Protocol):
    """What the job asks of its target beside the copying."""

    def give_up(self) -> None: ...

    def is_server_there(self) -> bool: ...


class MirrorResources(Protocol):
    """Who made the job and takes it away again, and keeps what is to outlive the process."""

    def changed(self, job: MirrorJob) -> None:
        """What is kept of the job may have become another."""

    def prepare(self, job: MirrorJob, done: Done) -> None:
        """It is about to end well: do what takes time beforehand, so that `commit` is quick."""

    def commit(self, job: MirrorJob, done: Done) -> None:
        """It ends well now, and `done` without an error means that this is on disk."""

    def uncommit(self, job: MirrorJob) -> None:
        """Take `commit` back: the job goes on."""

    def forget(self, job: MirrorJob, done: Done) -> None:
        """It ends otherwise; `done` is called within a bound."""

    def pivot(self, job: MirrorJob) -> None:
        """Guest writes are held and the target is level: serve the disk from the target."""

    def released(self, job: MirrorJob) -> None:
        """The job uses source and target no more; after a pivot the old source is free to be
        closed."""

    def dismissed(self, job: MirrorJob) -> None:
        """The job is to be forgotten."""

    def scan(self, job: MirrorJob, done: Done) -> None:
        """Mark dirty what the source's top layer holds (sync=top), or what is not zero
        (target-is-zero)."""

    def reconnect_source(self, job: MirrorJob, done: Done) -> None:
        """Bring a lost source back, trying for as long as guests' requests wait for it; if it is
        not lost, `done` is called at once. An error is no DeviceLost."""

    def reconnect(self, job: MirrorJob, done: Done) -> None:
        """Bring a lost target back, trying for its reconnect-delay; if it is not lost, `done` is
        called at once. What was not flushed is dirty then. An error is no DeviceLost."""
