"""Mutants of the rules of points: each breaks one, and the machine of pointmachine.py must catch
each.

Numbers are those of nbdmirror/points/writer.py (W) and of the steps of applier.py (A).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from model.pointworld import PointWorld

from nbdmirror.devices.base import Done, Run
from nbdmirror.points import applier, ownership, reader, recovery
from nbdmirror.points.format import BLOCK_BYTES, State
from nbdmirror.points.requests import Flush, Program, Request, Side, Trim, Write, around
from nbdmirror.points.superblocks import Superblocks
from nbdmirror.points.writer import JournalWriter


class Patched(PointWorld):
    """A world in which a function of the module is another one."""

    def __init__(self, seed: int) -> None:
        with contextlib.ExitStack() as stack:
            for one in self.patches():
                stack.enter_context(one)
            super().__init__(seed)
            self._patches.enter_context(stack.pop_all())

    def patches(self) -> Iterator[AbstractContextManager[Any]]:
        raise NotImplementedError


def without(program: Program[Any], kind: type[Request], side: Side, **wanted: Any) -> Program[Any]:
    """`program` without such requests."""

    def is_one(request: Request) -> bool:
        has = all(getattr(request, key) == value for key, value in wanted.items())
        return isinstance(request, kind) and request.side is side and has

    def others(requests: Sequence[Request]) -> Program[Sequence[Request]]:
        yield from ()
        return [request for request in requests if not is_one(request)]

    return around(program, others)


class SendsFooterBeforeFlush(PointWorld):
    """W1: the data may be in the far side's cache when the footer is on its storage."""

    class writer_class(JournalWriter):
        def _commit(self, batch: Any, tell: Done) -> Program[None]:
            return without(super()._commit(batch, tell), Flush, Side.JOURNAL)


class SendsFooterBeforeAcknowledgements(PointWorld):
    """W1: a flush covers what was acknowledged before it was sent, and nothing else."""

    class writer_class(JournalWriter):
        def _send(self, batch: Any, writes: Sequence[Request], done: Done) -> None:
            for write in writes:
                write.start(self._export, lambda error: None)
            done(None)


class SendsTheFirstAlone(PointWorld):
    """W1: small writes that wait are all sent, each to its place."""

    class writer_class(JournalWriter):
        def _send(self, batch: Any, writes: Sequence[Request], done: Done) -> None:
            firsts = [write for write in writes if isinstance(write, Write)]
            super()._send(
                batch, [replace(one, buf=memoryview(one.buf)[:BLOCK_BYTES]) for one in firsts], done
            )


class CommitsWhatFailed(PointWorld):
    """W1: a point with a failed write is given up; what is sent again is newer."""

    first_walk = 29

    breaks_at_errors = False

    class writer_class(JournalWriter):
        def _commit(self, batch: Any, tell: Done) -> Program[None]:
            batch.error = None
            return super()._commit(batch, tell)


class WritesFooterIntoTheCache(PointWorld):
    """W1: the point is announced while its footer may be lost."""

    class writer_class(JournalWriter):
        def _writes(self, place: int, data: Any, *, is_durable: bool = False) -> list[Write]:
            return super()._writes(place, data)


class CommitsBesideAFailure(PointWorld):
    """W1: what was flushed may be lost, as a write of the superblock was told."""

    class writer_class(JournalWriter):
        def _make_last(self, batch: Any, *arguments: Any) -> Program[None]:
            batch.failure = self.superblocks.failure
            return super()._make_last(batch, *arguments)


class WritesTheSuperblockBeside(Patched):
    """W1: the superblock may be told what the flush, or the footer, is not told then."""

    def patches(self) -> Iterator[AbstractContextManager[Any]]:
        alone = Superblocks.alone

        def wrong(self: Superblocks, program: Any) -> Program[None]:
            is_commit = program.__name__ == "_make_last"
            return program if is_commit else alone(self, program)

        yield patch.object(Superblocks, "alone", wrong)


class UsesSpaceEarly(PointWorld):
    """W3: space is free when its points are being applied, and not when the image holds them."""

    class writer_class(JournalWriter):
        @property
        def _tail(self) -> int:
            applying = self.superblocks.current.applying
            ends = [header.end for header in self.headers if header.point.sequence <= applying]
            return max([self._kept, *ends])

        @_tail.setter
        def _tail(self, tail: int) -> None:
            self._kept = tail


class WritesBesideTrims(PointWorld):
    """W3: a trim that comes late destroys what was written since."""

    class writer_class(JournalWriter):
        def free(self) -> Program[None]:
            old, self._tail = self._tail, self.superblocks.current.tail
            spans = self.superblocks.current.spans(old, self._tail - old)
            yield [Trim(Side.JOURNAL, offset, length) for offset, length in spans]


class BeginsBesideLateWrites(PointWorld):
    """W4: a write of a point that was given up hits the next one."""

    class writer_class(JournalWriter):
        def give_up(self, done: Done) -> None:
            self._in_flight = 0
            super().give_up(done)

        def _send(self, batch: Any, writes: Sequence[Request], done: Done) -> None:
            def then(error: BaseException | None) -> None:
                self._in_flight += batch is not self._batch  # was not counted any more
                done(error)

            super()._send(batch, writes, then)


class AnswersTheNextCommit(PointWorld):
    """A commit ends after it was told, and the next one may have begun: that is not told then."""

    class writer_class(JournalWriter):
        def commit(self, done: Done) -> None:
            self.last = done
            super().commit(done)

        def _commit(self, batch: Any, tell: Done) -> Program[None]:
            yield from super()._commit(batch, tell)
            self.last(None)


class ForgetsZeroes(PointWorld):
    """A range of zeroes is a change as any other."""

    class writer_class(JournalWriter):
        def put(self, runs: Sequence[Run], done: Done) -> None:
            data = [run for run in runs if run[2] is not None]
            super().put(data, done)


class LeavesTheSeedUnflushed(PointWorld):
    """The first point builds on an image that must be on its storage."""

    class writer_class(JournalWriter):
        def _commit(self, batch: Any, tell: Done) -> Program[None]:
            return without(super()._commit(batch, tell), Flush, Side.IMAGE)


class SeedsInSilence(PointWorld):
    """The image is written in place while the journal still offers points that build on it."""

    def seeding(self) -> Program[None]:
        if self.writer.superblocks.current.state is State.OK:
            return iter_nothing()
        return super().seeding()


def iter_nothing() -> Program[None]:
    yield []


class AppliesInSilence(Patched):
    """A2: the superblock does not say that the image is between two points."""

    def patches(self) -> Iterator[AbstractContextManager[Any]]:
        update = Superblocks.update

        def silent(self: Superblocks, **changes: Any) -> Program[None]:
            if changes.get("applying"):
                del changes["applying"]
            return update(self, **changes)

        yield patch.object(Superblocks, "update", silent)


class AppliesBeforeItSaysSo(Patched):
    """A2: the superblock that says it is still in the cache."""

    def patches(self) -> Iterator[AbstractContextManager[Any]]:
        update = Superblocks.update

        def lazy(self: Superblocks, **changes: Any) -> Program[None]:
            if not changes.get("applying"):
                yield from update(self, **changes)
                return
            program = update(self, **changes)
            for requests in program:
                yield [
                    replace(one, is_durable=False) if isinstance(one, Write) else one
                    for one in requests
                ]

        yield patch.object(Superblocks, "update", lazy)


class AppliesAnEarlierPointInstead(Patched):
    """A2: the image may have parts of the point that was begun."""

    def patches(self) -> Iterator[AbstractContextManager[Any]]:
        apply = applier.apply

        def forgetful(writer: JournalWriter, *arguments: Any, **options: Any) -> Program[None]:
            block = writer.superblocks.current
            writer.superblocks.current = replace(block, applying=0)
            return apply(writer, *arguments, **options)

        yield patch.object(applier, "apply", forgetful)


class MovesBaseBeforeFlush(Patched):
    """A4: the image's last writes may be in its cache."""

    def patches(self) -> Iterator[AbstractContextManager[Any]]:
        put = applier.put

        def wrong(*arguments: Any, **options: Any) -> Program[None]:
            return without(put(*arguments, **options), Flush, Side.IMAGE)

        yield patch.object(applier, "put", wrong)


class OldestContentWins(Patched):
    """A3: of a range that several points have, the newest content counts."""

    def patches(self) -> Iterator[AbstractContextManager[Any]]:
        parts = reader.newest_parts

        def wrong(journal: Any, headers: Any, visit: Any) -> Any:
            return parts(journal, headers[::-1], visit)

        yield patch.object(applier, "newest_parts", wrong)


class OverwritesOneSuperblock(Patched):
    """A power cut tears the only superblock that there is."""

    def patches(self) -> Iterator[AbstractContextManager[Any]]:
        write = Superblocks._write

        def wrong(self: Superblocks, changes: Any) -> Program[None]:
            self._slot = 1
            return write(self, changes)

        yield patch.object(Superblocks, "_write", wrong)


class LeavesOneSuperblockOld(Patched):
    """Damage to the newer superblock brings an older state back."""

    def patches(self) -> Iterator[AbstractContextManager[Any]]:
        write = Superblocks._write

        def wrong(self: Superblocks, changes: Any) -> Program[None]:
            if changes:
                yield from write(self, changes)

        yield patch.object(Superblocks, "_write", wrong)


class BelievesTheFooter(Patched):
    """A footer that can be read may be in a cache, or its durable write has failed."""

    def patches(self) -> Iterator[AbstractContextManager[Any]]:
        claim = ownership.claim

        def wrong(superblocks: Superblocks, headers: Any, **changes: Any) -> Program[None]:
            return claim(superblocks, (), **changes)

        for module in (ownership, recovery):
            yield patch.object(module, "claim", wrong)


class RecoversOnTheFooter(Patched):
    """The same, of recoveries alone."""

    def patches(self) -> Iterator[AbstractContextManager[Any]]:
        claim = ownership.claim

        def wrong(superblocks: Superblocks, headers: Any, **changes: Any) -> Program[None]:
            return claim(superblocks, (), **changes)

        yield patch.object(recovery, "claim", wrong)


POINT_MUTANTS = (
    BelievesTheFooter,
    RecoversOnTheFooter,
    SendsFooterBeforeFlush,
    SendsFooterBeforeAcknowledgements,
    SendsTheFirstAlone,
    CommitsWhatFailed,
    WritesFooterIntoTheCache,
    CommitsBesideAFailure,
    WritesTheSuperblockBeside,
    UsesSpaceEarly,
    WritesBesideTrims,
    BeginsBesideLateWrites,
    AnswersTheNextCommit,
    ForgetsZeroes,
    LeavesTheSeedUnflushed,
    SeedsInSilence,
    AppliesInSilence,
    AppliesBeforeItSaysSo,
    AppliesAnEarlierPointInstead,
    MovesBaseBeforeFlush,
    OldestContentWins,
    OverwritesOneSuperblock,
    LeavesOneSuperblockOld,
)
