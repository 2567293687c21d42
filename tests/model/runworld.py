"""One job with points, or two of a group, in a world in which everything goes wrong (runparts.py).

After each step `check` does what a user may do at that moment: the power of the far side fails, and
a point is recovered from what is left. It must be what the disk was at one of the cuts, the last
announced one or a later one. The lag must not be told too small, nobody may be held for long, and a
job that is paused or has ended must let nothing fly. When all trouble is over (`calm`), points are
made again, of all that was changed, and each request for a point was answered.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest.mock import patch

from model.pointexports import Disk, DiskDevice
from model.runparts import INTERVAL_S, SIZE, Member
from support.rings import rings_of
from unit.mirror.jobdevices import StillLoop

from nbdmirror.errors import CommandError
from nbdmirror.events import Event, EventRing
from nbdmirror.mirror import frozen_view, point_sender, target_watch
from nbdmirror.mirror.activity import Activity
from nbdmirror.mirror.cut import CUT_LIMIT_S
from nbdmirror.mirror.options import CopyMode, Ending, Policy
from nbdmirror.mirror.point_group import PointGroup
from nbdmirror.mirror.point_request import PointRequest
from nbdmirror.mirror.points_view import REQUEST_S_MAX
from nbdmirror.mirror.quiesce import LIMIT_S
from nbdmirror.points import last_batch, reader, recovery
from nbdmirror.points.format import BLOCK_BYTES, JournalError, Point, State
from nbdmirror.points.group_recovery import instants
from nbdmirror.points.reader import Journal
from nbdmirror.points.requests import Side, run

Pick = Callable[[list[bytes]], bytes]
"""Which of a sector's contents a power cut leaves."""

ROOMY = 300
"""Blocks of a ring that is seldom full in so few steps."""

CALM_S = 12.0
"""All that was put off has happened by then."""


@dataclass(frozen=True)
class Moment:
    """By the name of each disk."""

    contents: dict[str, bytes]
    writes: dict[str, int]
    """How many of its guest's writes were answered."""


@dataclass
class Asked:
    request: PointRequest
    member: Member
    at_s: float


class RunWorld:
    """Mutants override what they break, by `patches`."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self._patches = ExitStack()
        self.loop, self.events = StillLoop(), EventRing(lambda: 0.0)
        self.keep_s = random.choice((0.0, 0.0, 3.0, 3600.0))
        ring = random.choice((34, 48, ROOMY, ROOMY))
        self.is_in_place = ring < ROOMY and random.random() < 0.3
        if self.is_in_place:
            ring = 16  # less than the disk
        self.is_roomy = ring == ROOMY
        """No point was ever in the way of another one."""
        self.ring_bytes = ring * BLOCK_BYTES
        self.policy = random.choice((Policy.IGNORE, Policy.STOP))
        self.stamps, self.groups, self._ticks = (itertools.count(1) for _ in range(3))
        self.moments: dict[int, Moment] = {}
        """What the disks were at these wall times."""
        self.has_changed_modes = False
        self.asked: list[Asked] = []
        self.next_event = 0
        self._patches.enter_context(rings_of(self.ring_bytes))
        self._patch(target_watch, "HUNG_S", 1e9)
        if random.random() < 0.7:  # a point is sent in parts, and guests save what was not sent
            self._patch(frozen_view, "CHUNK_BYTES", 2 * BLOCK_BYTES)
            self._patch(point_sender, "IN_FLIGHT_BYTES", 4 * BLOCK_BYTES)
        if random.random() < 0.3:  # the image becomes each point by what the journal has
            self._patch(last_batch, "KEPT_BYTES", 0)
        for one in self.patches():
            self._patches.enter_context(one)
        names = ("a", "b") if random.random() < 0.4 else ("a",)
        self.members = [Member(self, name) for name in names]
        self._begin()

    def patches(self) -> list[AbstractContextManager[Any]]:
        return []

    def _patch(self, module: object, name: str, value: object) -> None:
        self._patches.enter_context(patch.object(module, name, value))

    def close(self) -> None:
        self._patches.close()

    def _begin(self) -> None:
        group = PointGroup("key")
        if len(self.members) > 1:
            for member in self.members:
                member.job.share_points(group)
        for member in self.members:
            member.begin_life()
        self.settle()

    def moment(self) -> int:
        """The wall time, which no other call has had: what the disks are now."""
        time_ns = int(self.loop.now_s * 1e9) + next(self._ticks)
        members = getattr(self, "members", [])
        self.moments[time_ns] = Moment(
            {one.job.id: bytes(one.source.data) for one in members},
            {one.job.id: len(one.writes) for one in members},
        )
        return time_ns

    def contents_of(self, member: Member, *, at_least: int) -> set[bytes]:
        """At moments when at least so many writes were answered."""
        name = member.job.id
        found = self.moments.values()
        return {one.contents[name] for one in found if one.writes.get(name, -1) >= at_least}

    # Steps.

    def settle(self) -> None:
        self.loop.settle()
        self._hear()

    def pass_s(self, seconds: float) -> None:
        self.loop.pass_s(seconds)
        self._hear()

    def ask(self, member: Member, name: str) -> None:
        try:
            request = member.job.ask_for_point(name)
        except CommandError:
            return
        self.asked.append(Asked(request, member, self.loop.now_s))

    def end(self, member: Member, how: str) -> None:
        job = member.job
        if how == "force" and not (job.is_over or job.activity.is_bad_end):
            job.cancel(force=True)
        elif how and job.is_ready and job.ending is Ending.NONE and not job.pause_wanted:
            member.ending_writes = len(member.writes)
            if how == "complete":
                job.complete()
            else:
                job.cancel(force=False)

    def change_mode(self, member: Member, mode: CopyMode) -> None:
        if not member.job.is_over:
            self.has_changed_modes = True
            with suppress(CommandError):
                member.change_mode(mode)

    def kill(self) -> None:
        """The source's process ends, and another begins."""
        for member in self.members:
            if member.job.is_over or member.job.pivoted or member.is_leaving:
                return
        for member in self.members:
            while member.tokens:
                member.end_request()
            for device in member.devices:
                device.export.abandon(self.random)
            member.is_handed_over = member.state(is_lost=False) is State.PROMOTED
        now_s, self.loop = self.loop.now_s, StillLoop()
        self.loop.now_s = now_s
        self.events, self.next_event = EventRing(lambda: 0.0), 0
        self.asked.clear()
        self.members = [Member(self, one.job.id, one) for one in self.members]
        self._begin()

    def calm(self) -> None:
        """All trouble is over."""
        for member in self.members:
            while member.tokens:
                member.end_request()
            member.is_cut = False
            for device in member.devices:
                device.answer_all()
        self.settle()
        for member in self.members:
            if member.job.pause_wanted and not member.job.is_over:
                self.pass_s(INTERVAL_S)
                member.job.resume()
        self.pass_s(CALM_S)
        for member in self.members:
            if not member.job.is_over and not member.is_held:
                member.change(0, 1)
        self.pass_s(CALM_S)
        self.check()
        for member in self.members:
            self._check_calm(member)
        for one in self.asked:
            assert one.request.committed.done(), "lost: a request for a point was not answered"

    def _check_calm(self, member: Member) -> None:
        job = member.job
        if job.is_over:
            why = str(job.failure or "")
            is_known = not why or "force" in why
            # What a process has handed over, another one finds as if a user had recovered it.
            is_known = is_known or (member.was_handed_over and "was recovered from" in why)
            assert is_known, f"lost: {why}"
            return
        assert job.ending is Ending.NONE, f"lost: the job does not end: {job.activity}"
        assert job.status == "ready", f"lost: no points are made: {job.status}, {job.activity}"
        assert not member.is_held, "lost: guests are held"
        if member.is_leaving:
            assert job.plan is None, f"lost: points do not end: {job.activity}"
            assert member.image.export.disk.data == member.source.data, "lost: the image differs"
            return
        assert member.announced, "lost: there is no point"
        found = self._read(member.journal.export.left(lambda kept: kept[0]))
        newest = self.moments[found.points[-1].time_ns]
        is_all = newest.contents[job.id] == member.source.data
        assert is_all, "lost: what was changed is in no point"
        assert job.lag is not None and job.lag.lag_s < 1.0, "lost: the lag grows"
        if not self.keep_s and self.is_roomy and len(self.members) == 1:
            assert not found.headers, "lost: the image does not follow"

    # What must hold.

    def _hear(self) -> None:
        members = {member.job.id: member for member in self.members}
        for event in self.events.pull(self.next_event):
            self.next_event = event.number + 1
            if event.name == "X_NBDMIRROR_POINT":
                member, number = members[event.data["id"]], event.data["sequence"]
                member.announced = number
                member.numbers.add(number)
                member.cut_s[number] = event.data["time-s"]
            elif event.name == "X_NBDMIRROR_IN_PLACE":
                members[event.data["id"]].announced = 0
                members[event.data["id"]].cut_s.clear()
            elif event.name == "X_NBDMIRROR_PIVOTED":
                members[event.data["id"]].announced = 0

    def check(self) -> None:
        self.is_roomy = self.is_roomy and all(map(self._has_room, self.members))
        for member in self.members:
            self._check_held(member)
            self._check_still(member)
            self._check_far_side(member)
        self._check_common()
        for one in self.asked:
            self._check_asked(one)

    def _has_room(self, member: Member) -> bool:
        far = member.resources.far_side
        return far is None or far.writer.room().free_bytes > 4 * SIZE

    def _check_held(self, member: Member) -> None:
        now_s, gate = self.loop.now_s, member.disk.ledger.gate
        if gate is None or gate is not member.gate:
            member.gate, member.held_since_s = gate, now_s
            return
        limit_s = LIMIT_S if member.job.activity.may_hold_guests else CUT_LIMIT_S
        assert now_s - member.held_since_s <= limit_s + 0.01, "lost: guests are held too long"

    def _check_still(self, member: Member) -> None:
        activity = member.job.activity
        if activity is Activity.PAUSED or member.job.is_over:
            pending = [one.name for device in member.devices for one in device.export.pending]
            assert not pending, f"lost: {pending} in flight while the job is {activity}"

    def _check_asked(self, one: Asked) -> None:
        request, member = one.request, one.member
        is_late = self.loop.now_s > one.at_s + REQUEST_S_MAX + 1.0
        assert request.taken.done() or not is_late, "lost: a request waits for ever"
        if request.committed.done() and request.committed.exception() is None:
            point = request.committed.result()
            is_told = point.sequence in member.numbers
            assert is_told, f"lost: point {point.sequence} was promised and not announced"

    def _picks(self, member: Member) -> list[Pick]:
        exports = [device.export for device in member.devices]
        if not any(export.pending or export.disk.unflushed for export in exports):
            return [lambda kept: kept[0]]
        return [lambda kept: kept[0], lambda kept: kept[-1], self.random.choice]

    def _read(self, journal: Disk) -> Journal:
        program = reader.read("journal", len(journal.data))
        return run(program, {Side.JOURNAL: DiskDevice(journal)})

    def _check_far_side(self, member: Member) -> None:
        for pick in self._picks(member):
            image, journal = (device.export.left(pick) for device in member.devices)
            found = self._read(journal)
            if member.job.pivoted:
                is_promoted = found.superblock.state is State.PROMOTED
                assert is_promoted or not member.job.plan, "lost: the disk is offered again"
                continue
            if member.is_leaving and found.superblock.state is not State.OK:
                member.announced, member.cut_s = 0, {}
            assert member.announced or not member.cut_s or self.is_in_place
            if not member.announced and found.superblock.state is not State.OK:
                continue
            points = found.points
            assert points, f"lost: no point is on offer: {found.superblock.state}"
            assert not found.is_cut_short, f"lost: {found.damage}"
            newest = points[-1]
            assert newest.sequence >= member.announced, "lost: an announced point"
            self._check_window(member, points)
            for point in {newest, self.random.choice(points)}:
                self._check_recovery(member, image.copy(), journal.copy(), point)
            self._check_lag(member, newest)

    def _check_window(self, member: Member, points: list[Point]) -> None:
        """Points of the window are on offer, if there is room for all."""
        is_ending = member.job.ending is not Ending.NONE or member.is_leaving
        if not self.is_roomy or is_ending:
            return
        offered = {point.sequence for point in points}
        for number, at_s in member.cut_s.items():
            is_old = self.loop.now_s - at_s > self.keep_s - 0.01
            assert number in offered or is_old, f"lost: point {number} of the window"

    def _check_recovery(self, member: Member, image: Disk, journal: Disk, point: Point) -> None:
        moment = self.moments.get(point.time_ns)
        assert moment is not None, f"lost: point {point.sequence} is of no moment"
        program = recovery.recover(
            "journal",
            len(journal.data),
            len(image.data),
            wanted=str(point.sequence),
            now_ns=0,
            random_bytes=self.random.randbytes,
        )
        try:
            run(program, {Side.IMAGE: DiskDevice(image), Side.JOURNAL: DiskDevice(journal)})
        except JournalError as error:
            raise AssertionError(f"lost: {error}") from error
        is_right = image.data[:SIZE] == moment.contents[member.job.id]
        assert is_right, f"lost: point {point.sequence} is not what the disk was"

    def _check_lag(self, member: Member, newest: Point) -> None:
        """A disaster now costs what was answered since the point that is left."""
        if member.job.lag is None or member.job.is_over or not member.announced:
            return
        covered = self.moments[newest.time_ns].writes[member.job.id]
        for at_s in member.writes[covered : covered + 1]:
            truth_s = self.loop.now_s - at_s
            assert member.job.lag.lag_s >= truth_s - 1e-6, "lost: the lag is told too small"

    def _check_common(self) -> None:
        """A moment that both have announced, or a later one, is on offer in both."""
        if len(self.members) < 2 or not self.is_roomy or self.has_changed_modes:
            return
        if any(one.job.ending is not Ending.NONE or one.job.is_over for one in self.members):
            return
        told = [
            {e.data["group"]: e.data["time-s"] for e in self.events.pull(0) if is_of(e, one)}
            for one in self.members
        ]
        both = set(told[0]) & set(told[1])
        if both:
            lefts = [one.journal.export.left(lambda kept: kept[0]) for one in self.members]
            found = instants([self._read(left) for left in lefts])
            newest_s = max((instant[0].time_ns / 1e9 for instant in found), default=0.0)
            expected_s = max(told[0][group] for group in both)
            assert newest_s >= expected_s - 0.001, "lost: no moment is in both journals"


def is_of(event: Event, member: Member) -> bool:
    is_point, data = event.name == "X_NBDMIRROR_POINT", event.data
    return is_point and data["id"] == member.job.id and bool(data.get("group"))
