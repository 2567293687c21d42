"""Storages whose snapshots are the points, with the commands of docs/disaster-recovery.md; and what
all of them must do: each snapshot that was acknowledged is the disk of the point's moment."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from integration.mirror.points.killrounds import BLOCK, NumberedGuest
from integration.mirror.snapshots.snapshotsparts import Exec, start_mirror, wait_for_rest
from support.clients import connected
from support.fixtures import Start
from support.images import MiB, assert_identical, make_image
from support.kept import Kept
from support.processes import ROOT
from support.seeds import SEED, print_seed
from support.serverprocess import Server
from support.servers import Nbdmirror

PAGE = ROOT / "docs" / "disaster-recovery.md"
SIZE = 2 * MiB
SSH = 'ssh() { shift; sh -c "$*"; }; '
"""What ssh does with its words, without another host."""
CLOCK_S = 0.002
"""How exactly two clocks are compared, and a moment is told."""


class Storage(Protocol):
    """Its snapshots have the times of points as their names."""

    server: Server
    """Of the image, full of noise of `SIZE`; running."""
    command: str

    def snapshot(self, time: str) -> bytes:
        """Its content, once the server has ended."""

    def recover(self, time: str) -> str:
        """A path, or a URI: what a snapshot has, to be written to from now on."""


def documented(row: str, places: dict[str, str]) -> str:
    """The command that the page has for a storage, with places of ours for the page's."""
    line = rf"^\| {re.escape(row)}.*? \| `(.*?)` \| "
    (command,) = re.findall(line, PAGE.read_text(), re.MULTILINE)
    return SSH + replaced(command, places)


def block(language: str) -> str:
    """The only one that the page has."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return str(text)


def replaced(text: str, places: dict[str, str]) -> str:
    for theirs, place in places.items():
        assert theirs in text, text
        text = text.replace(theirs, place)
    return text


class Clock:
    """Wall clock times to the monotonic clock's, between which it may be set slowly."""

    def __init__(self) -> None:
        self._offsets_s = [time.time() - time.monotonic()]

    def bounds_s(self, moment: str) -> tuple[float, float]:
        self._offsets_s.append(time.time() - time.monotonic())
        wall_s = datetime.strptime(moment, "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC).timestamp()
        latest_s, earliest_s = (wall_s - pick(self._offsets_s) for pick in (min, max))
        return earliest_s - CLOCK_S, latest_s + CLOCK_S


def try_storage(start: Start, folder: Path, storage: Storage) -> None:
    """Under a guest's load, over a kill of the source; then source and load end at any moment, and
    a server begins with the last snapshot."""
    print_seed()
    disk = make_image(folder / "disk.img", SIZE)
    server = start(Kept(folder, disk))
    server.allowed.append(".*")  # nbdkit complains of guests that it ends on
    clock, guest = Clock(), NumberedGuest(disk, SEED)
    start_mirror(server, storage.server.uri(), device="vda", x_nbdmirror_reconnect_delay=60)
    with Exec(server, storage.command) as command:
        command.wait_for(1)
        guest.start(server.uri())
        command.wait_for_more(2)
        guest.stop()
        wait_for_rest(server, command)
        at_rest, content = command.acked[-1], disk.read_bytes()
        for round_ in range(2):
            if round_:
                server.start()
            guest.start(server.uri())
            command.wait_for_more(2)
            server.kill()
            guest.stop()
        storage.server.stop()
        assert command.end() == 130
        times = command.times
    for moment in times.values():
        earliest_s, latest_s = clock.bounds_s(moment)
        found = storage.snapshot(moment)
        guest.check(found, answered_before_s=earliest_s, begun_before_s=latest_s)
    assert_identical(content, storage.snapshot(times[at_rest]))
    last = list(times.values())[-1]
    expected = storage.snapshot(last)
    with Nbdmirror(folder, storage.recover(last)) as again:
        assert_identical(expected, again.uri())
        with connected(again.uri()) as handle:
            handle.pwrite(bytes(BLOCK), 0)
        assert_identical(bytes(BLOCK) + expected[BLOCK:], again.uri())
