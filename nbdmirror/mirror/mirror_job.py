"""MirrorJob: starts, watches and ends one mirror. The loop over data is the copier's.

All methods run on the event loop's thread. A command changes the wanted state and calls `advance`;
so does every event (copies settled, a timer). `advance` looks at the state, and does what is next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from nbdmirror.devices.base import Done
from nbdmirror.disk.bitmap import DirtyBitmap
from nbdmirror.disk.disk import Disk
from nbdmirror.disk.tracker import Tracker
from nbdmirror.errors import CommandError, ConfigError, DeviceLost
from nbdmirror.event_loop import Loop
from nbdmirror.events import EventRing
from nbdmirror.mirror.activity import Activity
from nbdmirror.mirror.copier import Copier
from nbdmirror.mirror.copy_mode import CopyModeSwitch
from nbdmirror.mirror.failure import Cancelled
from nbdmirror.mirror.group import HOLD_S
from nbdmirror.mirror.job_states import JobStatus, check_verb
from nbdmirror.mirror.ladder import Rung
from nbdmirror.mirror.mirror_view import MirrorView
from nbdmirror.mirror.options import CopyMode, Ending, MirrorOptions
from nbdmirror.mirror.pivot_pause import PivotPause
from nbdmirror.mirror.poll import Poll
from nbdmirror.mirror.quiesce import Attempt
from nbdmirror.mirror.rate_limit import Haste
from nbdmirror.mirror.resources import MirrorResources, Target
from nbdmirror.mirror.stopping import Stopping
from nbdmirror.mirror.target_watch import TargetWatch
from nbdmirror.mirror.timers import RETRY, JobTimers


class MirrorJob(MirrorView):
    """A mirror of `disk` to `target`. `copier` makes a stopped copier; `start` starts it."""

    def __init__(
        self,
        *,
        options: MirrorOptions,
        disk: Disk,
        target: Target,
        tracker: Tracker,
        copier: Callable[[MirrorJob], Copier],
        loop: Loop,
        events: EventRing,
        resources: MirrorResources,
        bitmap: DirtyBitmap | None = None,
    ) -> None:
        """`bitmap`: what sync=bitmap copies; cleared when the job completes."""
        super().__init__(options, disk, target, tracker, bitmap, loop, events)
        self.copier = copier(self)
        self.copier.set_speed(options.speed_bytes_per_s)
        self._resources = resources
        self._timers = JobTimers(loop, self.advance)
        self._quiesce: Attempt | None = None
        """Exists while guests may be held."""
        self.watch = TargetWatch(
            copier=self.copier,
            tracker=tracker,
            target=target,
            on_flush_error=partial(self.copy_failed, "write"),
            loop=loop,
            reconnect_delay_s=options.reconnect_delay_s,
        )
        self.pivot_pause = PivotPause(self, loop)
        self.is_scanned = options.sync == "none" or bitmap is not None
        """The dirty bitmap is complete. If not, the source's extents are queried first."""
        self.mode = CopyModeSwitch(
            disk=disk,
            tracker=tracker,
            target=target,
            whole_granules=options.sync != "full" or target.block_size.minimum > 1,
            # Synchronous: after this write is answered, no later write may reach the target.
            on_error=lambda error: loop.call(partial(self.copy_failed, "write", error), HOLD_S),
        )
        self._stopping = Stopping(self.copier, self.mode, self._timers, target.give_up)
        self._poll = Poll(
            timers=self._timers,
            loop=loop,
            ledger=disk.ledger,
            look=self._look,
            is_at_rest=self._is_at_rest,
            on_wake=self.watch.rest_ends,
        )

    def start(self) -> None:
        """Begin. Tracking is on before anything is marked or examined (rule 33)."""
        self.disk.ledger.attach(self.tracker.dirty)
        self.to(JobStatus.RUNNING, "started")
        if self.bitmap is not None:
            self.tracker.dirty.merge(self.bitmap)
        elif self.options.sync == "full" and not self.options.target_is_zero:
            self.tracker.dirty.mark_all()
            self.is_scanned = True
        self._begin()

    def take_up(self, restore: Callable[[], None], *, is_scanned: bool, is_paused: bool) -> None:
        """Continue a mirror of an earlier process: `restore` marks what may differ."""
        self.disk.ledger.attach(self.tracker.dirty)
        self.to(JobStatus.RUNNING, "the server was started again")
        restore()
        self.is_scanned = is_scanned
        if is_paused:
            self.become(Activity.PAUSING)
        self._begin()

    def _begin(self) -> None:
        if self.activity is Activity.NOT_STARTED:
            self.release()
        self.advance()
        self._poll.begin()

    def fail_at_start(self, reason: str) -> None:
        """Run and end at once with an error, as QEMU does for unequal sizes."""
        self.to(JobStatus.RUNNING, "started")
        self.fail(CommandError(reason))
        self.advance_soon()

    # Commands beside those that every job has.

    def change(self, copy_mode: CopyMode, **options: Any) -> None:
        """block-job-change. Raises CommandError. Unlike QEMU, allows a return to background."""
        check_verb(self.id, self.status, "change")
        self.options = replace(self.options, copy_mode=copy_mode, **options)
        if copy_mode is CopyMode.WRITE_BLOCKING or Rung.THROTTLE not in self.options.may:
            self.throttle.release("the job was changed")
        if self.copier.is_running:
            self.mode.turn(synchronous=copy_mode is CopyMode.WRITE_BLOCKING)
        self._poll.wake()
        self.changed()

    # The copier's observer. `operation` is "read" for the source, "write" for the target.

    def copy_failed(self, operation: str, error: BaseException) -> None:
        """Rules 20 and 21. The range is already dirty again. After the policy has decided on an
        error, errors of requests that were in flight with the first one are ignored."""
        self.mode.note_error()
        if not self.activity.hears_errors:
            return
        if isinstance(error, DeviceLost) and self._may_reconnect(operation):
            return
        if self.is_ignored(operation, error):
            self.become(Activity.BACKING_OFF)
            self._timers.retry(self._try_again)
        self.advance_soon()

    def _may_reconnect(self, operation: str) -> bool:
        """A side that is being reconnected, or will be, is not lost a second time."""
        is_scan = self.activity is Activity.SCANNING and operation == "write"
        if self.activity is Activity.RECONNECTING or is_scan:
            return True
        if may := self._may_be_lost(operation):
            self.release()
        return may

    def _may_be_lost(self, operation: str) -> bool:
        return self.watch.may_reconnect(operation)

    def copy_settled(self) -> None:
        self.advance()

    def target_lost(self) -> None:
        """The target's connection broke. Requests in flight report the loss themselves."""
        if not self.copier.in_flight and not self.is_over:
            self.copy_failed("write", DeviceLost(f"{self.target.description}: connection lost"))

    # Steps.

    def advance(self) -> None:
        if self.status is JobStatus.CREATED:
            return
        match self.activity:
            case Activity.COPYING | Activity.POSTPONED:
                self._advance_copying()
            case Activity.QUIESCING if self._quiesce is not None:
                self._quiesce.advance()
            case Activity.PAUSING if self._stopping.is_over(for_pause=True):
                self.become(Activity.PAUSED)
                self.paused()
            case Activity.ABORTING if self._stopping.is_over():
                self.end_badly()
            # Else the job waits for a step, a timer, the group or the user.

    def left(self, old: Activity) -> None:
        self._poll.wake()
        self._timers.abandon_step()
        if old.waits_to_try_again:
            self._timers.cancel(RETRY)
        if old.copies and not self.activity.copies:
            self.copier.stop()
            self.throttle.release(f"the job is {self.activity.value}")
            self.mode.turn(synchronous=False)
        if old.may_hold_guests and not self.activity.may_hold_guests:
            self._release_guest()

    def changed(self) -> None:
        if self.status is not JobStatus.CREATED:
            self._resources.changed(self.kept_state)

    def release(self) -> None:
        """Copy. First reconnect a source or target that is lost."""
        self.become(Activity.RECONNECTING)
        self.changed()
        self._do(self._resources.reconnect_source, self._reconnect_target, "read")

    def _reconnect_target(self) -> None:
        step = partial(self._resources.reconnect, self.copier.answers > 0)
        self._do(step, self._go_on, "write")

    def abort(self, because: str) -> None:
        self._stopping.cancelled = because
        self.fail(Cancelled(because))
        if self.activity is Activity.ABORTING:
            self._stopping.hurry()

    def limit_speed(self, speed_bytes_per_s: int) -> None:
        self.options = replace(self.options, speed_bytes_per_s=speed_bytes_per_s)
        self.copier.set_speed(speed_bytes_per_s)
        if self.was_ready:
            self.watch.outlook.forget_rate()  # before, it becomes that of the new limit
        self.changed()

    def forget(self, done: Done) -> None:
        self._resources.forget(done)

    def let_go(self) -> None:
        self.become(Activity.ENDED)
        self._resources.released()

    def dismissed(self) -> None:
        self._resources.dismissed()

    def _go_on(self) -> None:
        if self.is_scanned:
            self.become(Activity.COPYING)
            self.mode.turn(synchronous=self.options.copy_mode is CopyMode.WRITE_BLOCKING)
            self._hurry()
            self.copier.start()
        else:
            self.become(Activity.SCANNING)
            self._do(self._resources.scan, self._scanned, "read")

    def _scanned(self) -> None:
        self.is_scanned = True
        self.release()

    def _hurry(self) -> None:
        is_hurried = self.status is JobStatus.RUNNING or self.may_end
        self.copier.set_haste(Haste.STEADY if is_hurried else Haste.LAG)

    def _advance_copying(self) -> None:
        self._hurry()
        self.copier.pump()
        in_sync = self.mode.is_in_sync()
        if in_sync and self.status is JobStatus.READY and not self.may_end:
            self._timers.went_well()  # else there is a flush to come, which may fail again
        if self.activity is not Activity.COPYING:
            return
        if self.status is JobStatus.RUNNING and in_sync:
            self.become(Activity.FLUSHING)
            self._do(self.copier.flush, self._become_ready, "write")
        elif self.may_end:
            self.become(Activity.PREPARING)
            check = partial(self._resources.check_end, self.ending)
            self._timers.do(check, self._prepare, self._not_written_down)

    def _prepare(self) -> None:
        prepare = self.pivot_pause.timed(partial(self._resources.prepare, self.ending))
        self._timers.do(prepare, self._begin_quiesce, self._not_written_down)

    def _become_ready(self) -> None:
        """After the flush, once (rule 14)."""
        self.follow()
        self.to(JobStatus.READY, "source and target are in sync")
        self.tell("BLOCK_JOB_READY")

    def follow(self) -> None:
        """Count from now on what is sent, and how old what is not sent is."""
        self.become(Activity.COPYING)
        self._timers.went_well()
        self.tracker.refine()
        self.count_traffic()
        self.lag = self.watch.follow(self._poll.alarm)

    def _do(self, step: Callable[[Done], None], then: Callable[[], None], operation: str) -> None:
        """Do `step`, then `then`; an error counts as an error of `operation`."""
        self._timers.do(step, then, partial(self.copy_failed, operation))

    def _begin_quiesce(self) -> None:
        self.become(Activity.QUIESCING)
        self._quiesce = self.pivot_pause.attempt(
            on_level=self._on_level,
            on_timeout=self._on_quiesce_timeout,
            on_old=self._begin_anew,
            on_flush_error=partial(self.copy_failed, "write"),
        )
        self._quiesce.advance()

    def _on_quiesce_timeout(self) -> None:
        """The guest writes faster than the rest can be copied: guest and job continue."""
        self._begin_anew()
        self.tell_quiesce_timeout()

    def _begin_anew(self) -> None:
        self.become(Activity.COPYING)
        self.advance_soon()

    def _on_level(self) -> None:
        """Guest writes are held and the target equals the source, durably."""
        self.become(Activity.HELD)
        if self.status is JobStatus.READY:
            self.to(JobStatus.WAITING, "has done its work")
            self.group.arrived()
            if not (self.group.is_finalizing and self.group.is_level):
                # QEMU holds the guest until the group ends; here the mirror continues.
                self.become(Activity.COPYING)
                return
        self._timers.after("level", self.pivot_pause.hold_s, self._held_in_vain)
        self.group.got_level()

    def _held_in_vain(self) -> None:
        self.group.held_in_vain(self)
        self._on_quiesce_timeout()

    def _not_written_down(self, error: BaseException | None) -> None:
        """The end, or another one of its group, could not be recorded: continue, and try again."""
        self.become(Activity.POSTPONED)
        if isinstance(error, ConfigError):  # the target cannot be the disk
            self.fail(error)
        elif self._stopping.cancelled:
            self.abort(self._stopping.cancelled)
        else:
            reason = error or "the state directory failed"
            self.log.warning("continues, because its end cannot be recorded: %s", reason)
            self._timers.retry(self._try_again)
        self.advance_soon()

    def commit(self, done: Done) -> None:
        self.become(Activity.COMMITTING)
        self._timers.cancel("level")
        self._resources.commit(done)

    def commit_failed(self, *, was_committed: bool) -> None:
        if was_committed:
            self._resources.uncommit(self._not_written_down)
            self.changed()
        else:
            self._not_written_down(None)

    def finish(self) -> None:
        if self.bitmap is not None and self.options.clear_bitmap:
            self.bitmap.clear_all()
        if self.ending is Ending.COMPLETE:
            self._resources.pivot()
            self.pivoted = True
        self.detach()
        if self.pivoted:
            self.tell_pivoted(self.disk.name, self.pause_s or 0.0)
        self.let_go()
        self.concluded("BLOCK_JOB_COMPLETED")

    def detach(self) -> None:
        self.watch.end()
        self._poll.end()
        self.mode.turn(synchronous=False)
        self.disk.ledger.detach(self.tracker.dirty)
        self._release_guest()
        self.copier.close()
        self._timers.cancel_all()

    def _release_guest(self) -> None:
        self._timers.cancel("level")
        quiesce, self._quiesce = self._quiesce, None
        if quiesce is not None and (held_s := quiesce.release()) is not None:
            self.pause_s = held_s

    def _try_again(self) -> None:
        if self.activity is Activity.POSTPONED:
            self.become(Activity.COPYING)
        else:
            self.release()
        self.advance()

    def _is_at_rest(self) -> bool:
        """Only a guest, or one that calls, changes what there is to do."""
        follows = self.status is JobStatus.READY and self.activity is Activity.COPYING
        return follows and not self.may_end and self.mode.is_background and self.watch.is_at_rest

    def _look(self) -> None:
        self.tracker.look(self.disk.ledger)
        self.watch.look(may_flush=not self.activity.may_hold_guests)
        self.advance()
