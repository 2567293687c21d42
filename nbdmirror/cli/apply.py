"""`nbdmirror apply`: a process beside an image that makes the image the points of its journal, so
that the source sends to the journal alone."""

from __future__ import annotations

import argparse
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from nbdmirror.cli.common import DONE, CliError
from nbdmirror.cli.points import AGAIN, opened_disks
from nbdmirror.cli.streams import say
from nbdmirror.devices.base import BlockDevice, raw_device
from nbdmirror.ending_signals import heeded
from nbdmirror.errors import DeviceError, DeviceLost, Error
from nbdmirror.nbdclient.pair import is_disk_of
from nbdmirror.points.appliers_block import GONE_S, ApplierBlock
from nbdmirror.points.follower import Follower, other_text
from nbdmirror.points.requests import Devices, Side, run
from nbdmirror.points.superblocks import JournalTaken

POLL_S = 0.1
"""Pause after a look at a journal that grants nothing new."""


def run_command(args: argparse.Namespace) -> int:
    places = [("--image", args.image), ("--journal", args.journal)]
    try:
        with opened_disks(places) as (image, journal), _interruptible() as ending:
            return _Applying(image, journal, ending).run()
    except Error as error:
        again = f"; {AGAIN}" if isinstance(error, DeviceError) else ""
        raise CliError(f"{error}{again}") from error


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The event is set by the first signal that ends the command; the second one ends it at
    once."""
    ending = threading.Event()

    def interrupted(number: int, frame: FrameType | None) -> None:
        ending.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, interrupted) for number in heeded()}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Applying:
    def __init__(self, image: BlockDevice, journal: BlockDevice, ending: threading.Event) -> None:
        self._sides: Devices = {Side.IMAGE: image, Side.JOURNAL: journal}
        self._ending = ending
        self._image = image.description
        self._follower = Follower(
            journal.description,
            journal.size,
            image.size,
            number=1 + secrets.randbelow(2**64 - 1),
            is_to_end=ending.is_set,
        )

    def run(self) -> int:
        """Until a signal, or until the image is somebody else's. Raises Error and OSError."""
        other = run(self._follower.look(), self._sides)
        self._check_image()
        if other is not None:
            other = self._gone(other)
        if self._ending.is_set():
            return DONE
        run(self._follower.announce(other), self._sides)
        say(f"applying points to {self._image}, as soon as the source sees that")
        try:
            self._follow()
        except JournalTaken as error:
            run(self._follower.end(), self._sides)
            say(f"nbdmirror: {error}")
            return DONE
        except (Error, OSError) as error:
            # After a lost connection a write may be on its way: then the next one must tell.
            if not isinstance(error, DeviceLost):
                with suppress(Error, OSError):
                    run(self._follower.end(), self._sides)
            raise
        run(self._follower.end(), self._sides)
        return DONE

    def _check_image(self) -> None:
        """Raise CliError if the image is the disk itself: old points would be written under its
        guest."""
        if is_disk_of(self._follower.disk_id, raw_device(self._sides[Side.IMAGE])):
            text = "is the disk whose points that journal has, or what is written there is written"
            raise CliError(f"--image: {self._image}: {text} to that disk, too")

    def _follow(self) -> None:
        is_first = True
        while not self._ending.is_set():
            run(self._follower.beat(), self._sides)
            if not run(self._follower.step(), self._sides):
                self._ending.wait(POLL_S)
            elif is_first:
                say(f"{self._image} is point {self._follower.point}, and follows the source")
                is_first = False

    def _gone(self, other: ApplierBlock) -> ApplierBlock | None:
        """Wait until `other` shows no sign of life for long. None: it has ended in order. Raises
        JournalTaken if it lives."""
        end_s = time.monotonic() + GONE_S
        while time.monotonic() < end_s and not self._ending.wait(POLL_S):
            found = run(self._follower.look(), self._sides)
            if found is None:
                return None
            if found != other:
                raise JournalTaken(other_text(self._follower.name))
        return other
