"""`nbdmirror handover`: moves a running guest to another host, with its memory and its disk.

    check              both servers run, and fit together              nothing is begun
    mirror             until READY                                     the guest runs here
    migrate            QEMU copies its memory to the QEMU that waits   the guest runs here
    (pre-switchover)   QEMU has stopped it, drained and flushed it     the guest is stopped
    pivot              from now on the target is the disk              the guest is stopped
    migrate-continue   the guest continues there, on the target        the guest runs there

At each moment the guest is on one side, and one disk is current. Before the pivot any failure,
--timeout and SIGINT undo everything. After the pivot the target is the current disk, wherever the
guest continues; then SIGINT waits for the result, within a bound. docs/migration.md explains why
this order is safe.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from qemu.qmp import QMPError

from nbdmirror.cli import words as cli_words
from nbdmirror.cli.common import DONE, FAILED, INTERRUPTED, NO_SERVER, TIMED_OUT, CliError
from nbdmirror.cli.jobs import Watch
from nbdmirror.cli.progress import Display, open_display
from nbdmirror.cli.session import QEMU, Session, connect, run_interruptible, server_path
from nbdmirror.identity import Same, same_place
from nbdmirror.names import default_job_id

Result = TypeVar("Result")

POLL_S = 0.5
CAPABILITIES = ("pause-before-switchover", "events", "return-path")
"""Capabilities of QEMU's migration: it stops before its end, for the pivot; an event reports that
at once, since the guest waits; and it is completed when the other side confirms."""
PIVOT_S_MAX = 30.0
"""Longest time that the guest is stopped for the pivot, before the handover is undone."""
CANCEL_S_MAX = 10.0
FINISH_S_MAX = 60.0
"""Longest time for the last part of the guest's memory, after the pivot."""
ELSEWHERE = ("inmigrate", "postmigrate", "finish-migrate")
OVER = ("none", "completed", "failed", "cancelled")
QEMU_ADVICE = "name a QMP socket of the QEMU that runs the guest with --qemu (QEMU: -qmp unix:PATH)"


def run(args: argparse.Namespace) -> int:
    return run_interruptible(_run(args))


async def _run(args: argparse.Namespace) -> int:
    async with (
        connect(server_path(args)) as server,
        connect(args.qemu, program=QEMU, advice=QEMU_ADVICE) as qemu,
    ):
        with open_display(time.monotonic) as display:
            handover = _Handover(args, server, _Qemu(qemu, args.qemu), display)
            await handover.check()
            try:
                async with asyncio.timeout(args.timeout):
                    await handover.mirror()
                    await handover.migrate()
            except (CliError, QMPError, TimeoutError, asyncio.CancelledError) as error:
                raise await _undisturbed(handover.undo(error), display) from error
            text = await _undisturbed(handover.switch(), display)
        print(text)
        return DONE


async def _undisturbed(step: Coroutine[Any, Any, Result], display: Display) -> Result:
    """Run a bounded step that SIGINT does not interrupt."""
    task = asyncio.ensure_future(step)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            why = "so that the guest's location is known"
            display.note(f"interrupted: this step is finished first, {why}")
    return task.result()


class _Handover:
    def __init__(
        self, args: argparse.Namespace, server: Session, qemu: _Qemu, display: Display
    ) -> None:
        self._args = args
        self._server = server
        self._qemu = qemu
        self._display = display
        self._disk: dict[str, Any] = {}
        self._names: list[str] = []
        self._job = ""
        self._watch: Watch | None = None

    async def check(self) -> None:
        """Find the disk and its job. Raises CliError; then nothing has begun."""
        disks = {disk["name"]: disk for disk in (await self._server.status()).get("disks", [])}
        names = ", ".join(disks) or "none"
        if not self._args.device and len(disks) != 1:
            raise CliError(f"the server's disks are: {names}; choose one with --device")
        name = self._args.device or next(iter(disks))
        if name not in disks:
            raise CliError(f"there is no disk {name}; the server's disks are: {names}")
        self._disk, self._names = disks[name], list(disks)
        for job in self._disk.get("jobs", []):
            self._job = job["device"]
            target = job.get("target", self._args.target)
            if same_place(target, self._args.target, resolves=True) is not Same.YES:
                text = f"job {self._job} mirrors {name} to {target}, not to {self._args.target}"
                raise CliError(f"{text}: name that target, or end the job")
            if job.get("paused"):
                text = f"job {self._job} is paused; continue with: nbdmirror resume"
                raise CliError(text)
            if not job.get("auto-finalize", True):
                text = f"job {self._job} has auto-finalize off: the guest would wait for you"
                raise CliError(f"{text}; start a job without that")
        await self._qemu.check(self._disk)

    async def mirror(self) -> None:
        """Mirror until source and target are in sync; a running mirror is used."""
        is_new = not self._job
        self._job = self._job or default_job_id(self._disk["name"], self._names)
        self._watch = Watch(self._server, self._job, self._display)
        if is_new:
            self._server.events.clear()  # drop events of an earlier job
            await self._server.execute(
                "drive-mirror",
                device=self._disk["name"],
                target=self._args.target,
                job_id=self._job,
                mode="existing",
                sync="full",
            )
        await self._watch.until(ready=True)
        self._still_mirrors()
        self._display.note(f"{self._job}: the target follows the source")

    async def migrate(self) -> None:
        """Migrate until QEMU has stopped the guest, with only a last part of its memory left."""
        assert self._watch
        await self._qemu.begin(self._args.to)
        self._display.note(f"memory: migrating to {self._args.to}")
        with open_display(time.monotonic) as display:
            while True:
                state = await self._qemu.look(display)
                job = await self._watch.look()
                if job and job.get("paused"):
                    raise CliError(f"job {self._job} was paused: {job.get('io-status', 'ok')}")
                self._still_mirrors()
                if state == "pre-switchover":
                    break
                if state in OVER:
                    raise CliError(f"the migration {state}{self._qemu.reason}")
                await self._qemu.wait_for_news()
        self._display.note("guest: stopped for the pivot")

    async def switch(self) -> str:
        """Pivot and continue. Returns the message."""
        await self._pivot()
        self._display.note(f"{self._job}: pivoted; the guest continues at {self._args.to}")
        try:
            downtime_ms = await self._qemu.finish()
        except CliError as error:
            raise await self._stayed(error) from error
        return (
            f"handed over: the guest runs at {self._args.to} on {self._args.target}; it was stopped"
            f" for {downtime_ms} ms. End the QEMU here, and then the server of {self._disk['name']}"
        )

    async def _pivot(self) -> None:
        """Pivot. Raises CliError if the target is not the disk afterwards: what was undone, or is
        unknown."""
        assert self._watch
        try:
            await self._server.execute("job-complete", id=self._job)
            if not await self._job_is_over(PIVOT_S_MAX):
                self._display.note(f"{self._job}: no pivot within {PIVOT_S_MAX:g} s, given up")
                await self._server.execute("job-cancel", id=self._job)
                if not await self._job_is_over(CANCEL_S_MAX):
                    raise CliError("the server does not end the job", TIMED_OUT)
            self._still_mirrors(is_over=True)
            if not self._watch.pivoted:
                raise CliError(f"job {self._job} was cancelled by another client: no pivot")
        except QMPError as error:
            raise self._unknown(error) from error
        except CliError as error:
            if error.status == FAILED:
                raise await self.undo(error) from error
            raise self._unknown(error) from error

    async def _job_is_over(self, seconds_max: float) -> bool:
        assert self._watch
        try:
            async with asyncio.timeout(seconds_max):
                await self._watch.until(ready=False)
        except TimeoutError:
            return False
        return True

    def _still_mirrors(self, *, is_over: bool = False) -> None:
        """Raise CliError if the job has failed, or, unless `is_over`, has ended."""
        assert self._watch
        self._watch.raise_failure(verb="handover")
        if self._watch.end and not is_over:
            raise CliError(f"job {self._job} was ended by another client")

    async def undo(self, error: BaseException) -> CliError:
        """Let the guest continue here, without a change. Returns the error to report."""
        reason, status = self._told(error)
        parts = [reason]
        try:
            parts.append(await self._qemu.undo())
        except CliError as second:
            parts.append(f"the migration could not be cancelled ({second})")
        disk = await self._disk_now()
        if disk is None:
            text = "its disk was {} before; what the server serves now is not known"
            parts.append(text.format(self._disk["source"]))
        else:
            parts.append(f"its disk is {disk['source']}")
            jobs = disk.get("jobs", [])
            parts += [
                f"the mirror {job['device']} continues ({cli_words.state(job)})" for job in jobs
            ]
        return CliError("; ".join(parts), status)

    async def _disk_now(self) -> dict[str, Any] | None:
        """The disk's status on the server; None if the server does not answer."""
        with contextlib.suppress(CliError, QMPError):
            disks = (await self._server.status())["disks"]
            return dict(next(one for one in disks if one["name"] == self._disk["name"]))
        return None

    def _told(self, error: BaseException) -> tuple[str, int]:
        if isinstance(error, CliError):
            return str(error), error.status
        if isinstance(error, TimeoutError):
            return f"timed out after {self._args.timeout:g} s", TIMED_OUT
        if isinstance(error, asyncio.CancelledError):
            return "interrupted", INTERRUPTED
        return f"lost the connection to the server ({error})", NO_SERVER

    def _unknown(self, error: BaseException) -> CliError:
        """The result is unknown. The guest is stopped. Until it continues, the old disk has all its
        writes; after a pivot both disks have them."""
        text = (
            f"the server did not report whether the disk was pivoted ({error}); the guest is"
            f" stopped and has lost nothing. Start the server again on {self._disk['source']}, or,"
            f" if the server reports a pivot, on {self._args.target}; then continue the guest here"
            " with QEMU's migrate_cancel"
        )
        return CliError(text, NO_SERVER)

    async def _stayed(self, error: BaseException) -> CliError:
        """The migration failed after the pivot. Returns the error to report."""
        reason, status = self._told(error)
        truth = f"the disk is {self._args.target} now"
        if (disk := await self._disk_now()) is not None:
            truth += f", and the server here serves it from {disk['source']}"
        try:
            state = await self._qemu.guest_state()
        except CliError:
            state = "unknown"
        where = {
            "running": "it continues here",
            "postmigrate": "it is stopped here; if it does not run there, continue it with cont",
            "unknown": "make sure that it runs on one side only",
        }.get(state, f"it is {state} here")
        return CliError(f"{reason}; the guest: {where}; {truth}", status)


class _Qemu:
    """The QEMU that runs the guest, and its migration."""

    def __init__(self, session: Session, path: str) -> None:
        self._session = session
        self._path = path
        self._before: list[dict[str, Any]] = []
        self._state_before = ""
        self._has_begun = False
        self._info: dict[str, Any] = {}

    @property
    def reason(self) -> str:
        """QEMU's reason for a failed migration."""
        return f": {text}" if (text := self._info.get("error-desc")) else ""

    async def check(self, disk: dict[str, Any]) -> None:
        """Raise CliError if the guest cannot be migrated, or has another disk."""
        await self._check_migrates()
        self._state_before = await self.guest_state()
        if self._state_before in ELSEWHERE:
            text = f"the guest of {self._path} cannot be moved in state {self._state_before}"
            raise CliError(text)
        state = (await self._ask("query-migrate")).get("status", "none")
        if state not in OVER:
            raise CliError(f"the guest of {self._path} is being migrated already: {state}")
        capabilities = await self._ask("query-migrate-capabilities")
        self._before = [found for found in capabilities if found["capability"] in CAPABILITIES]
        if len(self._before) < len(CAPABILITIES):
            raise CliError(f"the QEMU at {self._path} is too old: it lacks {CAPABILITIES[0]}")
        nodes = await self._ask("query-named-block-nodes")
        sizes = {node["image"]["virtual-size"] for node in nodes}
        if disk["size"] not in sizes:
            text = f"the guest of {self._path} has no disk of {disk['size']} bytes"
            raise CliError(f"{text}: it is not the one that {disk['name']} is served to")

    async def _check_migrates(self) -> None:
        """Raise CliError if this is QEMU's storage daemon, whose greeting is the same as QEMU's."""
        names = {command["name"] for command in await self._ask("query-commands")}
        if "migrate" not in names:
            text = f"{self._path} is the control socket of a {QEMU} that has no guest to migrate"
            raise CliError(f"{text} (a storage daemon): {QEMU_ADVICE}", NO_SERVER)

    async def begin(self, uri: str) -> None:
        wanted = [{"capability": name, "state": True} for name in CAPABILITIES]
        self._has_begun = True
        await self._ask("migrate-set-capabilities", capabilities=wanted)
        self._session.events.clear()
        await self._ask("migrate", uri=uri)

    async def look(self, display: Display | None = None) -> str:
        """The migration's state; shows its progress."""
        self._info = await self._ask("query-migrate")
        state = str(self._info.get("status", "none"))
        if (ram := self._info.get("ram")) and display:
            total, left = ram.get("total", 0), ram.get("remaining", 0)
            progress = {"device": "memory", "offset": total - left, "len": total}
            display.update({**progress, "status": state})
        return state

    async def wait_for_news(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._session.events.get()

    async def finish(self) -> int:
        """Do the last step. Returns how long the guest was stopped, in milliseconds."""
        await self._ask("migrate-continue", state="pre-switchover")
        state = await self._over(FINISH_S_MAX)
        if state != "completed":
            raise CliError(f"the migration {state} after the pivot{self.reason}")
        return int(self._info.get("downtime", 0))

    async def undo(self) -> str:
        """Cancel the migration, if there is one. Returns what happened to the guest."""
        if self._has_begun:
            if await self.look() not in OVER:
                await self._ask("migrate_cancel")
                await self._over(CANCEL_S_MAX)
            await self._ask("migrate-set-capabilities", capabilities=self._before)
        state = await self.guest_state()
        if state == "postmigrate":
            return "another client continued the guest at the other side before the pivot"
        if state != self._state_before:
            return f"the guest is {state} here"
        return "the guest continues here" if state == "running" else f"the guest is still {state}"

    async def guest_state(self) -> str:
        """QEMU's RunState. Right after a failed migration it may still change."""
        deadline_s = time.monotonic() + CANCEL_S_MAX
        while True:
            state = str((await self._ask("query-status"))["status"])
            if state != "finish-migrate" or time.monotonic() > deadline_s:
                return state
            await self.wait_for_news()

    async def _ask(self, command: str, **arguments: Any) -> Any:
        try:
            return await self._session.execute(command, **arguments)
        except QMPError as error:
            raise CliError(f"lost the connection to the QEMU at {self._path}", NO_SERVER) from error

    async def _over(self, seconds_max: float) -> str:
        """The final state of the migration."""
        try:
            async with asyncio.timeout(seconds_max):
                while (state := await self.look()) not in OVER:
                    await self.wait_for_news()
                return state
        except TimeoutError as error:
            text = f"the migration has not ended after {seconds_max:g} s"
            raise CliError(text, TIMED_OUT) from error
