"""`nbdmirror apply`, as tests run it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from integration.mirror.points.killrounds import Rounds
from integration.mirror.points.pointsparts import FarSide
from support.fixtures import Start
from support.processes import nbdmirror_environment
from support.serverprocess import Server
from support.waiting import wait_until


class Command(Server):
    """A command that runs for a while. `stderr` has its stdout too."""

    name = "command"

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        super().__init__(folder)
        self.arguments = tuple(map(str, arguments))

    def argv(self) -> list[str]:
        return [sys.executable, "-m", "nbdmirror", *self.arguments]

    def environment(self) -> dict[str, str]:
        return nbdmirror_environment()

    def is_ready(self) -> bool:
        return True

    def wait_to_end(self) -> int:
        process = self.process
        assert process is not None
        wait_until(lambda: process.poll() is not None, f"the {self.name} ends")
        self.process = None
        return int(process.returncode)


class Applier(Command):
    """The command, as a server that is ready when it says so."""

    name = "applier"

    def __init__(self, folder: Path, image: str, journal: str) -> None:
        super().__init__(folder, "apply", "--image", image, "--journal", journal)

    def is_ready(self) -> bool:
        return "applying points to" in self.stderr

    @property
    def follows(self) -> bool:
        return "and follows the source" in self.stderr


def applier_of(far: FarSide, folder: Path) -> Applier:
    return Applier(folder, far.image_server.uri(), far.journal_server.uri())


def wait_to_follow(applier: Applier) -> None:
    wait_until(lambda: applier.follows, "the applier was asked, and has applied a point")


class AppliedRounds(Rounds):
    """With an applier in each round, which is killed first, or at the same time as the others."""

    def __init__(self, *rounds: Any, start: Start, folder: Path) -> None:
        super().__init__(*rounds)
        self._start = start
        self._folder = folder
        self._applier: Applier | None = None

    def begin(self) -> None:
        self._applier = self._start(applier_of(self.far, self._folder))
        wait_to_follow(self._applier)
        if self.rng.random() < 0.5:
            self._applier.kill()

    def round(self, which: str) -> None:
        super().round(which)
        if self._applier is not None:
            self._applier.kill()

    def end(self) -> None:
        """Another one continues."""
        self._applier = self._start(applier_of(self.far, self._folder))

    def ended(self) -> None:
        assert self._applier is not None
        self._applier.stop()
