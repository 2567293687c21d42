"""Acknowledgements: a whole point in an image that is overwritten in place is safe only when
somebody says that there is a snapshot of it. Until then nothing is written to the image.

    begins -> announce -> given     the snapshot is there: the point is safe
                   |----> refused   there is no snapshot: the point is broken
                   |----> withdraw  the job breaks the point: it pauses, or has lost its far side
                   '----> release   the job ends, and nothing is written to the image any more

On the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable

from nbdmirror.devices.base import Done
from nbdmirror.errors import CommandError, Error


class Acknowledgements:
    """Those of one job. `newest`: the number of the last point that was announced, perhaps by an
    earlier process. `last`: that of the last one that was acknowledged, and `last_ns` the wall time
    of that point's cut, in nanoseconds since 1970; 0: none was."""

    def __init__(self, newest: int = 0, last: int = 0, last_ns: int = 0) -> None:
        self.newest = max(newest, last)
        self.last = last
        self.last_ns = last_ns
        self.awaited = 0
        """The number of the point whose acknowledgement is awaited; 0: none is."""
        self.was_given = True
        """The last point that counts as committed was acknowledged, or there is none."""
        self.on_awaited: Callable[[], None] = lambda: None
        """Tells users that the point `awaited` is whole."""
        self.on_over: Callable[[], None] = lambda: None
        """It is not awaited any more."""
        self.is_needed: Callable[[], bool] = lambda: True
        """False: nothing but the image is to have the points."""
        self.write_down: Callable[[Done], None] = lambda done: done(None)
        """Keeps `newest`, `last` and `last_ns` for a later process, and then calls its argument.
        Should that fail, a number may come again after a restart: that is no reason to leave users
        without the point."""
        self.awaited_ns = 0
        """The wall time of the cut of the point that waits."""
        self._done: Done | None = None
        self._refused = 0
        """The number of the last point that was refused."""
        self._withdrawn: BaseException | None = None

    def begins(self) -> None:
        """Another point begins: from now on the image is overwritten."""
        assert not self.awaited, "the image is written to while a point waits"
        self._withdrawn = None

    def next_number(self) -> int:
        """The number of a point that is whole. Each number is taken once, so that two snapshots
        never have the same one."""
        self.newest += 1
        return self.newest

    def announce(self, done: Done) -> None:
        """The point `newest` is whole: `done` is called when it counts, or does not."""
        if self._withdrawn is not None:
            done(self._withdrawn)
        elif self.is_needed():
            self.awaited, self._done = self.newest, done
            self.on_awaited()
        else:
            self.was_given = False
            done(None)

    def give(self, number: int, refusal: str | None = None) -> bool:
        """There is a snapshot of the point `number`; or `refusal` says why there is none. Returns
        whether that was said before, by a client that has lost the answer, perhaps. Raises
        CommandError; then nothing has changed."""
        if number and number in (self.last, self._refused):
            if (number == self.last) is not (refusal is None):
                how = "acknowledged" if number == self.last else "refused"
                raise CommandError(f"Point {number} was {how} before")
            return True
        if number != self.awaited or not number:
            waits = f"for that of point {self.awaited}" if self.awaited else "for none now"
            text = f"No acknowledgement of point {number} is awaited"
            raise CommandError(f"{text}: the job waits {waits}")
        if refusal is None:
            self.last, self.last_ns, self.was_given = number, self.awaited_ns, True
            self.awaited, done = 0, self._done
            # Before the point counts: a client that has lost the answer may ask a later process.
            self.write_down(lambda _: self._end(None) if self._done is done else None)
        else:
            self._refused = number
            self._end(Error(f"point {number} was refused: {refusal or 'no reason was given'}"))
        return False

    def withdraw(self, error: BaseException) -> None:
        """The point in progress is broken: its acknowledgement is not awaited, now or later."""
        self._withdrawn = error
        self._end(error)

    def release(self) -> None:
        """Nothing is written to the image any more: the point that waits is the last one."""
        if self.awaited:
            self.was_given = False
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        done, self._done, self.awaited = self._done, None, 0
        if done is not None:
            self.on_over()
            done(error)
