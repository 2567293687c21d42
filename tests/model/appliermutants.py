"""Mutants of the rules of an applier beside the image: the machine of appliermachine.py must catch
each."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from model.applierworld import AppliedWorld
from model.pointmutants import without

from nbdmirror.points import delegation, recovery
from nbdmirror.points.applier import apply
from nbdmirror.points.appliers_block import ApplierBlock, Phase, Presence
from nbdmirror.points.follower import Follower
from nbdmirror.points.format import Superblock
from nbdmirror.points.reader import read
from nbdmirror.points.requests import Flush, Program, Side


class WritesWithoutLooking(AppliedWorld):
    """The grant is looked at before each group of writes, after WORKING is said."""

    first_walk = 67

    class follower_class(Follower):
        def _look_around(self, grant: Superblock | None) -> Program[None]:
            return super()._look_around(None)


class SaysWorkingLate(AppliedWorld):
    """Whoever wants the image takes an applier that rests for one that writes nothing."""

    class follower_class(Follower):
        def _say(self, phase: Phase, **what: Any) -> Program[None]:
            yield from super()._say(Phase.RESTING if phase is Phase.WORKING else phase, **what)


class SaysDoneBeforeFlush(AppliedWorld):
    """The image's last writes may be in its cache when the source moves the base."""

    class follower_class(Follower):
        def _put(self, *arguments: Any) -> Program[None]:
            return without(super()._put(*arguments), Flush, Side.IMAGE)


class SaysDoneAtOnce(AppliedWorld):
    """The image is not the point yet."""

    class follower_class(Follower):
        def _say(self, phase: Phase, **what: Any) -> Program[None]:
            if phase is Phase.WORKING:
                headers = yield from self._headers(what["point"])
                what = {"point": what["point"], "digest": headers[-1].digest, "samples": ()}
                phase = Phase.DONE
            yield from super()._say(phase, **what)

        def _headers(self, point: int) -> Program[Any]:
            return (yield from read(self.name, self._export_bytes, until=point)).headers


class AppliesWithoutGrant(AppliedWorld):
    """The superblock says who may write to the image: else the source does as well."""

    first_walk = 18

    class follower_class(Follower):
        def _is_granted(self, block: Superblock) -> bool:
            return bool(block.applying)


class PatchedApplied(AppliedWorld):
    """A world in which something of the modules is other."""

    def world_patches(self) -> list[AbstractContextManager[Any]]:
        return [*super().world_patches(), *self.mutations()]

    def mutations(self) -> list[AbstractContextManager[Any]]:
        raise NotImplementedError


class RecoversWithoutWaiting(PatchedApplied):
    """An applier that has not seen yet that its grant is withdrawn still writes."""

    first_walk = 18

    def mutations(self) -> list[AbstractContextManager[Any]]:
        return [patch.object(recovery, "until_rests", lambda *_: iter(()))]


class RecoversBesideTheGrant(PatchedApplied):
    """A recovery withdraws the grant before it changes the image."""

    first_walk = 29

    def mutations(self) -> list[AbstractContextManager[Any]]:
        init = recovery.Promotion.__init__

        def keeps(self: recovery.Promotion, *arguments: Any) -> None:
            init(self, *arguments)
            del self.first["applier"]

        return [patch.object(recovery.Promotion, "__init__", keeps)]


class TrustsSilence(PatchedApplied):
    """An applier that says nothing for long may write later."""

    first_walk = 57

    def mutations(self) -> list[AbstractContextManager[Any]]:
        look_after = delegation._look_after

        def takes_back(writer: Any, said: Any, presence: Presence) -> Program[None]:
            if presence is Presence.GONE:
                yield from writer.superblocks.update(applier=0)
                yield from apply(writer, writer.newest.sequence)
            else:
                yield from look_after(writer, said, presence)

        return [patch.object(delegation, "_look_after", takes_back)]


class TrustsAnyDone(PatchedApplied):
    """DONE is said of one point."""

    def mutations(self) -> list[AbstractContextManager[Any]]:
        def has_done(self: ApplierBlock, block: Superblock, digest: bytes) -> bool:
            return self.phase is Phase.DONE

        return [patch.object(ApplierBlock, "has_done", has_done)]


class TrustsRest(PatchedApplied):
    """An applier that rests has not begun, or was interrupted."""

    def mutations(self) -> list[AbstractContextManager[Any]]:
        def has_done(self: ApplierBlock, block: Superblock, digest: bytes) -> bool:
            return self.phase is not Phase.WORKING

        return [patch.object(ApplierBlock, "has_done", has_done)]


APPLIER_MUTANTS = (
    WritesWithoutLooking,
    SaysWorkingLate,
    SaysDoneBeforeFlush,
    SaysDoneAtOnce,
    AppliesWithoutGrant,
    RecoversWithoutWaiting,
    RecoversBesideTheGrant,
    TrustsSilence,
    TrustsAnyDone,
    TrustsRest,
)
