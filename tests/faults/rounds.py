"""Rounds of trouble: a mirror with a state directory, something that is killed or cut at a random
moment, what a user then does, and what must hold.

A round is one `Cell` (what is hit, when, and whether the guest is busy) and a seed, which chooses
the rest (`Plan`, roundplan.py) and can be replayed. It raises AssertionError if a write is lost,
the wrong side is served, more is sent again than may differ, or the two sides are not equal in the
end.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable

from faults.roundmeasure import Measured
from faults.roundplan import ENDING_S, FIRST_COPY_BYTES_PER_S, GRANULE, RECONNECT_S, SIZE, Outcome
from support.clients import connections
from support.losing import Lossy, add_target
from support.serverprocess import Server
from support.servers import QemuNbd
from support.waiting import wait_until


class Round(Measured):
    """A story with an end."""

    def run(self) -> Outcome:
        """Raises AssertionError, which tells how to replay it."""
        self._choose()
        began_s = time.monotonic()
        try:
            with self._world():
                self._play()
        except BaseException as error:
            error.add_note(f"replay: {self.cell}, seed {self.seed}; {self.plan}")
            raise
        outcome = self.outcome
        outcome.took_s = time.monotonic() - began_s
        outcome.requests = self.guest.requests
        outcome.compared_bytes += self.guest.read_bytes
        return outcome

    # The story.

    def _play(self) -> None:
        self.guest.start()
        self.guest.wait_for_requests(self.plan.requests)
        if self.cell.guest == "idle":
            self.guest.pause()
        self._reach_phase()
        is_measured = self.plan.guest_goes_on or self.cell.what == "nothing"
        if self._does_not_notice and self.cell.guest == "busy" and is_measured:
            self._start_probe()
        hit = {
            "guest": self._hit_guest,
            "server": self._hit_server,
            "target": self._hit_target,
            "link": self._hit_link,
            "both": self._hit_both,
            "nothing": self._hit_nothing,
        }[self.cell.what]
        hit()
        self._check_again()
        self._finish()

    def _reach_phase(self) -> None:
        phase, plan, qmp = self.cell.phase, self.plan, self.qmp
        add_target(qmp, self.target_uri, RECONNECT_S)
        qmp.start_mirror(
            "tgt",
            device="vda",
            granularity=GRANULE,
            on_target_error="report",
            speed=FIRST_COPY_BYTES_PER_S if phase == "first copy" else 0,
            copy_mode="write-blocking" if plan.is_write_blocking else "background",
        )
        if phase == "first copy":
            goal = int((0.1 + 0.7 * plan.moment) * SIZE)
            wait_until(lambda: qmp.job()["offset"] >= goal, "a part is copied")
            return
        qmp.wait_ready()
        if self.cell.guest == "idle":
            self._wait_caught_up()
            self.guest.touched.clear()  # the rest was flushed for READY
            self._rouse()
        if self.cell.what in ("server", "both") and self._regions_count:
            self._have_it_saved()
        if self.cell.guest == "busy":
            self.guest.wait_for_requests(plan.requests)
        if phase == "pivoted":
            qmp.complete()
            self.is_pivoted = True
            self._rouse()

    def _rouse(self) -> None:
        """An idle guest writes a little now and then."""
        if self.cell.guest == "idle":
            self.guest.resume()
            self.guest.wait_for_requests(self.noise.randint(1, 10))
            self.guest.pause()
        else:
            self.guest.wait_for_requests(self.plan.requests)

    def _have_it_saved(self) -> None:
        """What is dirty is on disk twice: regions of before the first one have left the log."""
        for _ in range(2):
            self.qmp.execute("block-dirty-bitmap-add", node="vda", name="x", persistent=True)
            self.qmp.execute("block-dirty-bitmap-remove", node="vda", name="x")

    def _begin_to_complete(self) -> None:
        """Send the command, and be away at some moment of what follows."""
        if self.cell.phase != "completing":
            return
        is_stepwise = self.plan.step is not None and self.cell.what in ("server", "both")
        if is_stepwise:
            aside = self.step_path.with_suffix(".new")  # the server never finds it empty
            aside.write_text(str(self.plan.step))
            aside.rename(self.step_path)
        self.qmp.socket.sendall(b'{"execute": "block-job-complete", "arguments": {"device": "j"}}')
        if is_stepwise:
            self._wait_over(self.server)
        else:
            time.sleep(self.plan.moment**3 * ENDING_S)

    # What is hit. Each ends with the guest paused, looked at, and the target level.

    def _hit_nothing(self) -> None:
        self.guest.wait_for_requests(120)
        self.guest.pause()
        self._catch_up()
        self._end_probe()

    def _hit_guest(self) -> None:
        """Another one looks at the disk when the server has noticed, and nothing is under way."""
        guest = self.guest
        lost_at = self._mark()
        guest.allows_lost_connection = True
        self._begin_to_complete()
        guest.vanish()
        self._count("guest killed")
        wait_until(lambda: not connections(self.server.socket), "the server lets the guest go")
        guest.allows_lost_connection = False
        if self.cell.phase == "completing":
            self._wait_pivoted()
        self._settle()
        self._catch_up()
        self._check_sent(lost_at)

    def _hit_server(self) -> None:
        self.guest.allows_lost_connection = True
        self._begin_to_complete()
        self._kill_server()
        self._serve_again()
        self._measure_since_start()

    def _hit_both(self) -> None:
        self.guest.allows_lost_connection = True
        self._begin_to_complete()
        order = [self._kill_server, self._kill_target]
        for kill in order if self.plan.first == "server" else reversed(order):
            kill()
        may_come_later = self.cell.phase in ("first copy", "READY") and self.plan.moment < 0.5
        if may_come_later:
            self._serve_again()
            self._target_comes_back()
        else:
            self._target_comes_back()
            self._serve_again()
        self._measure_since_start()

    def _hit_target(self) -> None:
        is_ordered = self.plan.is_ordered and (
            self.cell.phase in ("first copy", "completing") or self.cell.guest == "busy"
        )
        if is_ordered:
            assert isinstance(self.target, Lossy)
            self._storage_may_lose()
            kinds = ["flush", "write"] if self.cell.phase == "completing" else ["write"]
            kind = self.noise.choice(kinds)
            number = self.noise.randint(1, 2) if kind == "flush" else self.noise.randint(1, 6)
            self.target.order(f"kill {kind} {number}")
        self._begin_to_complete()
        if is_ordered and self.target.process is not None:
            self._wait_over(self.target)
        self._kill_target()
        self._live_without_target(self._target_comes_back)

    def _wait_over(self, server: Server) -> None:
        """Until it has killed itself as ordered. It may never: there were fewer such moments."""
        process = server.process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)

    def _hit_link(self) -> None:
        proxy, trouble = self.proxy, self.plan.trouble
        assert proxy is not None
        self._begin_to_complete()
        self._count(f"link: {trouble}")
        if trouble == "reset":
            proxy.reset()
        elif trouble == "half close":
            proxy.half_close()
        else:
            proxy.stall()

        def mend() -> None:
            if trouble == "stall and reset":
                proxy.reset()
            proxy.forward()

        self._live_without_target(mend)

    def _live_without_target(self, mend: Callable[[], None]) -> None:
        """The guest goes on; `mend`; the target gets what it has missed."""
        guest, plan = self.guest, self.plan
        is_busy = self.cell.guest == "busy"
        does_not_notice = self._does_not_notice
        guest.allows_lost_flush = self._target_may_be_disk
        if is_busy and does_not_notice:
            guest.wait_for_requests(60)
        if does_not_notice and not plan.guest_goes_on:
            guest.pause()
        before = self._offset()
        lost_at = self._mark()
        if not does_not_notice:
            time.sleep(plan.moment * 0.3)
        mend()
        if self.cell.phase == "completing":
            self._wait_pivoted()
        if is_busy and plan.guest_goes_on:
            guest.wait_for_requests(60)
        if not does_not_notice and is_busy:
            guest.wait_for_requests(20)  # those that waited for the target have been answered
        guest.pause()
        self._settle()
        self._catch_up()
        self._end_probe()
        if does_not_notice and not plan.guest_goes_on:
            self.outcome.again_bytes = self._offset() - before
        self._check_sent(lost_at)

    # The end.

    def _finish(self) -> None:
        if self.is_pivoted:
            self._go_back()
        else:
            self._end_mirror()

    def _end_mirror(self) -> None:
        guest, qmp, is_complete = self.guest, self.qmp, self.plan.ending.endswith("complete")
        if self.cell.guest == "busy":
            guest.resume()
            guest.wait_for_requests(20)
            if not is_complete:
                guest.pause()
        qmp.execute(self.plan.ending, device="j")
        qmp.wait_completed()
        if self.cell.guest == "busy" and is_complete:
            guest.wait_for_requests(20)
            guest.pause()
        guest.settle()
        guest.take_for_flushed()
        self._identical(guest.content(), self.target.uri())
        if self.cell.guest == "idle" or not is_complete:
            self._identical(self.source.uri() if self.source else self.disk, self.target.uri())

    def _go_back(self) -> None:
        """From the target, which is the disk now, to where it came from."""
        guest, qmp = self.guest, self.qmp
        if self.cell.guest == "busy":
            guest.resume()
            guest.wait_for_requests(20)
        guest.pause()
        guest.settle()
        guest.take_for_flushed()
        home = self.source or self._start(QemuNbd(self.folder, self.disk))
        qmp.start_mirror(home.uri(), device="vda", job_id="back", granularity=GRANULE)
        qmp.wait_ready("back")
        qmp.execute("block-job-cancel", device="back")
        qmp.wait_completed("back")
        self._identical(guest.content(), self.target.uri())
        self._identical(self.target.uri(), home.uri())
