"""States, verbs and endings, compared with qemu-storage-daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.images import KiB, MiB
from support.parity import assert_alike
from support.paritydifferences import PROGRESS, Difference, substituted, without
from support.paritysides import Setting, Side
from support.paritysteps import (
    ACTIVELY_SYNCED,
    SLOW,
    STARTED,
    Script,
    Step,
    add,
    call,
    change,
    dismiss,
    do,
    event,
    fault,
    heal,
    held,
    images,
    in_sync,
    is_served,
    known,
    mirror,
    query,
    ready,
    start,
    status,
    swapped,
    until,
    write,
    zero,
)

PAUSE = do("block-job-pause", device="j")
RESUME = do("block-job-resume", device="j")
COMPLETE = do("block-job-complete", device="j")
SOFT_CANCEL = do("block-job-cancel", device="j")
FORCE_CANCEL = do("block-job-cancel", device="j", force=True)
JOB_CANCEL = do("job-cancel", id="j")
FINALIZE = do("job-finalize", id="j")
IN_FLIGHT = [
    until(lambda job: job["busy"] and job["len"] > 0, "a copy is in flight"),
    held("target", "write"),
]
IN_SYNC = in_sync()
WAYS: dict[str, list[Script]] = {
    "running": [start(**SLOW), [STARTED]],
    "paused": [start(**SLOW), [STARTED, PAUSE, status("paused")]],
    "ready": [start(), [ready()]],
    "standby": [start(), [ready(), PAUSE, status("standby")]],
    "pending": [
        start(auto_finalize=False),
        [ready(), COMPLETE, event("BLOCK_JOB_PENDING", id="j")],
    ],
    "pending soft": [
        start(auto_finalize=False),
        [ready(), SOFT_CANCEL, event("BLOCK_JOB_PENDING", id="j")],
    ],
    "concluded": [start(), [ready(), COMPLETE, status("concluded")]],
    "cancelled": [start(**SLOW), [STARTED, FORCE_CANCEL, status("concluded")]],
}
"""How a job gets into each state."""

REFUSED_OR_HARMLESS: dict[str, list[Step]] = {
    "running": [RESUME, COMPLETE, FINALIZE, do("job-dismiss", id="j")],
    "paused": [PAUSE, COMPLETE, SOFT_CANCEL, FINALIZE, do("job-dismiss", id="j")],
    "ready": [RESUME, FINALIZE, do("job-dismiss", id="j")],
    "standby": [PAUSE, SOFT_CANCEL, FINALIZE, do("job-dismiss", id="j")],
    "pending": [PAUSE, RESUME, COMPLETE, do("job-dismiss", id="j")],
    "pending soft": [PAUSE, RESUME, COMPLETE, do("job-dismiss", id="j")],
    "concluded": [PAUSE, RESUME, COMPLETE, SOFT_CANCEL, FORCE_CANCEL, JOB_CANCEL, FINALIZE],
    "cancelled": [PAUSE, RESUME, COMPLETE, SOFT_CANCEL, FORCE_CANCEL, JOB_CANCEL, FINALIZE],
}


def speeds(state: str) -> list[Step]:
    """Those without a limit would let a running job get READY in the midst."""
    values = (-1, 65536) if state == "running" else (-1, 2**62, 0, 65536)
    return [do("block-job-set-speed", device="j", speed=value) for value in values]


@pytest.mark.rule(16)
@pytest.mark.parametrize("state", WAYS)
def test_verbs_that_change_nothing(folder: Path, state: str) -> None:
    """What each state refuses, with QEMU's text, by both families, and whether it lets the copy
    mode be changed; then the job can be ended."""
    both: list[Step] = []
    for step in REFUSED_OR_HARMLESS[state]:
        both.append(step)
        if (verb := step.text.partition("(")[0]).startswith("block-job-") and verb != (
            "block-job-cancel"
        ):
            both.append(do(verb.removeprefix("block-"), id="j"))
    synced = [ACTIVELY_SYNCED] if state == "ready" else []
    script: list[Script] = [WAYS[state], [query()], both, speeds(state), [query()]]
    script += [[change(), synced, query()]]
    if state not in ("concluded", "cancelled"):
        script += [[JOB_CANCEL, status("concluded")]]
    assert_alike(folder, Setting(), [script, [query()], dismiss()], PROGRESS)


ENDINGS = {
    "complete": COMPLETE,
    "job-complete": do("job-complete", id="j"),
    "soft": SOFT_CANCEL,
    "force": FORCE_CANCEL,
    "job-cancel": JOB_CANCEL,
    "finalize": FINALIZE,
}
ACCEPTED = [
    *[("running", name) for name in ("soft", "force", "job-cancel")],
    *[("paused", name) for name in ("force", "job-cancel")],
    *[("ready", name) for name in ("complete", "job-complete", "soft", "force", "job-cancel")],
    *[("standby", name) for name in ("force", "job-cancel")],
    *[("pending", name) for name in ("soft", "force", "finalize")],
    *[("pending soft", name) for name in ("soft", "job-cancel", "finalize")],
]


@pytest.mark.parametrize(("state", "ending"), ACCEPTED)
def test_two_rounds_after_each_ending(folder: Path, state: str, ending: str) -> None:
    """The job ends; then the disk is mirrored again, to a second target if the first is in use."""
    is_pivot = ending in ("complete", "job-complete") or (state, ending) == ("pending", "finalize")
    is_copy = is_pivot or ending == "finalize" or (state, ending) == ("ready", "soft")
    second = call("a second target", lambda side: side.start_target("second", MiB))
    script: list[Script] = [
        WAYS[state],
        [ENDINGS[ending], status("concluded"), query(), images(target=is_copy), dismiss()],
        [swapped() if is_pivot else write(512, 1000)],
        [second, add("again", "second")],
        [mirror(device="tgt" if is_pivot else "src", target="again"), ready(), write(4096)],
        [IN_SYNC, COMPLETE, status("concluded"), query()],
        [call("the copy is the disk", is_served("second"))],
    ]
    assert_alike(folder, Setting(), script, PROGRESS)


@pytest.mark.guarantee("It is QEMU's job, over QMP")
def test_the_plain_run(folder: Path) -> None:
    script: list[Script] = [
        start(auto_dismiss=True, speed=MiB, buf_size=64 * KiB),
        [do("block-job-set-speed", device="j", speed=4 * MiB), ready()],
        [do("block-job-set-speed", device="j", speed=0), query(), write(0), write(MiB // 2)],
        [IN_SYNC, query(), COMPLETE, status("null"), query(), images(), swapped()],
    ]
    assert_alike(folder, Setting(), script)


@pytest.mark.rule(46)
def test_complete_in_standby_is_remembered(folder: Path) -> None:
    script: list[Script] = [
        WAYS["standby"],
        [write(), COMPLETE, query(), COMPLETE, RESUME, status("concluded"), query(), images()],
        [swapped()],
    ]
    assert_alike(folder, Setting(), script, LEN_IN_STANDBY)


LEN_IN_STANDBY = Difference(
    "len of a paused job",
    "QEMU counts what a guest dirties only when the job runs again; nbdmirror shows it at once",
    substituted(r'(len|total-progress)=\d+( .*status="standby"|)', r"\1=?\2"),
)


def test_pause_and_resume(folder: Path) -> None:
    """A paused job's offset stays; a guest goes on; speed can be set."""
    script: list[Script] = [
        [start(**SLOW), STARTED, PAUSE, status("paused"), query(), PAUSE],
        [write(MiB - 4096, 4096), do("block-job-set-speed", device="j", speed=0), query()],
        [
            do("block-job-set-speed", device="j", speed=SLOW["speed"]),
            RESUME,
            do("job-resume", id="j"),
        ],
        [do("block-job-set-speed", device="j", speed=4 * MiB), ready()],
        [do("block-job-set-speed", device="j", speed=0), query()],
        [do("job-pause", id="j"), status("standby"), write(), zero(65536, 65536)],
        [do("job-pause", id="j"), do("job-resume", id="j"), IN_SYNC, query(), images()],
        [COMPLETE, status("concluded"), query()],
    ]
    assert_alike(folder, Setting(), script, PROGRESS)


PATIENT = """
import nbdmirror.mirror.stopping
nbdmirror.mirror.stopping.CANCEL_GRACE_S = 3600.0
"""
"""After a forced cancel nbdmirror waits for a target that hangs, as QEMU does (rule 42)."""


@pytest.mark.parametrize(
    "verbs",
    [
        ["complete", "complete", "soft"],
        ["soft", "soft", "complete"],
        ["complete", "force"],
        ["soft", "job-cancel"],
    ],
    ids="-".join,
)
def test_verbs_while_the_end_is_worked_off(folder: Path, verbs: list[str]) -> None:
    """The copy hangs meanwhile: the first of complete and soft cancel wins, force beats both."""
    is_forced = verbs[-1] in ("force", "job-cancel")
    script: list[Script] = [
        start(),
        [ready(), fault("target", "write", "hold"), write(), IN_FLIGHT],
        [ENDINGS[verb] for verb in verbs],
        [do("block-job-set-speed", device="j", speed=2**40), query()],
        [heal("target", "write"), status("concluded"), query(), images(target=not is_forced)],
        [swapped() if verbs[0] == "complete" and not is_forced else query()],
    ]
    assert_alike(folder, Setting(target="faulty", patches=PATIENT), script)


@pytest.mark.rule(22)
@pytest.mark.parametrize("phase", ["first copy", "ready"])
def test_pause_while_a_copy_hangs(folder: Path, phase: str) -> None:
    """Told at once, true later. The first copy is one request to both."""
    hold = fault("target", "write", "hold")
    is_first = phase == "first copy"
    script: list[Script] = [
        [hold, start(), IN_FLIGHT] if is_first else [start(), [ready(), hold, write(), IN_FLIGHT]],
        [PAUSE, query(), PAUSE, SOFT_CANCEL, RESUME, query(), PAUSE],
        [heal("target", "write"), status("paused" if is_first else "standby"), query()],
        [RESUME, [ready()] if is_first else [IN_SYNC], query()],
        [COMPLETE, status("concluded"), images()],
    ]
    size = 64 * KiB if is_first else MiB
    assert_alike(folder, Setting(target="faulty", size=size), script)


# Numbers of all kinds


@pytest.mark.parametrize("sync", ["full", "top", "none"])
@pytest.mark.parametrize("size", [0, 512, MiB, 1025 * KiB])
def test_sizes(folder: Path, size: int, sync: str) -> None:
    """With a guest's write of the last bytes. sync=none copies that alone."""
    last = [write(size - 512, 512), IN_SYNC] if size else []
    script: list[Script] = [
        start(sync=sync),
        [ready(), query(), last, query(), write(0, min(size, 65536)) if size else query(), IN_SYNC],
        [images(equal=sync != "none"), COMPLETE, status("concluded"), query(), dismiss()],
    ]
    differences = [] if size else [NOTHING_TO_SYNC]
    assert_alike(folder, Setting(size=size, source_content="runs"), script, *differences)


NOTHING_TO_SYNC = Difference(
    "actively-synced of a disk of no bytes",
    "QEMU says true in either copy mode; nbdmirror where writes would be synchronous",
    substituted(r"actively-synced=\w+", "actively-synced=?"),
)


@pytest.mark.rule(27)
@pytest.mark.parametrize("other", [MiB - 512, MiB + 512, 0])
def test_sizes_that_differ(folder: Path, other: int) -> None:
    """Not an error of the command: the job begins and fails (rule 27)."""
    script: list[Script] = [
        start(),
        [status("concluded"), query(), FINALIZE, images(target=False), dismiss()],
    ]
    assert_alike(folder, Setting(target_size=other), script)


@pytest.mark.parametrize(
    ("granularity", "buf_size"),
    [
        (512, 512),
        (512, 1),
        (512, 64 * KiB),
        (4 * KiB, 1),
        (4 * KiB, 1000),
        (64 * KiB, 4 * KiB),
        (64 * KiB, 100_000),
        (MiB, 64 * KiB),
        (64 * MiB, 0),
        (64 * MiB, 1),
        (0, 0),
    ],
)
def test_granularity_and_buf_size(folder: Path, granularity: int, buf_size: int) -> None:
    size = 257 * KiB if granularity <= 4 * KiB else 1025 * KiB
    script: list[Script] = [
        start(granularity=granularity, buf_size=buf_size),
        [ready(), query(), write(512, 512), IN_SYNC, query(), write(65536, 65536), IN_SYNC],
        [images(), COMPLETE, status("concluded"), query(), swapped()],
    ]
    assert_alike(folder, Setting(size=size, source_content="runs"), script)


@pytest.mark.parametrize("buf_size", [2**30 + 1, 2**62, 2**63 - 1])
def test_a_buf_size_that_is_too_large(folder: Path, buf_size: int) -> None:
    difference = Difference(
        "a bound on buf-size",
        "QEMU takes what it gets of memory, and its job fails where that does not suffice",
        without(""),
    )
    script: list[Script] = [start(buf_size=buf_size), [call("nothing is copied", _no_job_if_ours)]]
    assert_alike(folder, Setting(), script, difference)


def _no_job_if_ours(side: Side) -> None:
    if side.kind == "nbdmirror":
        assert "at most" in side.qmp.log[-2]["error"]["desc"]
        assert side.qmp.execute("query-jobs") == []


@pytest.mark.rule(30)
@pytest.mark.parametrize("target", ["noise", "empty"])
@pytest.mark.parametrize("source", ["runs", "empty"])
@pytest.mark.parametrize(
    "extra",
    [{}, {"unmap": False}, {"unmap": True}, {"target-is-zero": True}],
    ids=lambda extra: str(extra or "plain"),
)
def test_holes(folder: Path, source: Any, target: Any, extra: dict[str, bool]) -> None:
    """QEMU's blockdev-mirror has no `unmap`, and target-is-zero since 10.1 only: there the same
    script runs without them, and the images must be the same."""
    if "target-is-zero" in extra and target == "noise":
        pytest.skip("that would be a lie")
    script: list[Script] = [
        start(**known(extra)),
        [ready(), zero(0, 128 * KiB), write(300 * KiB, 1000), IN_SYNC],
        [images(), COMPLETE, status("concluded"), swapped()],
    ]
    setting = Setting(source_content=source, target_content=target)
    assert_alike(folder, setting, script, PROGRESS)


@pytest.mark.rule(4)
@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_len_and_offset(folder: Path, copy_mode: str) -> None:
    """Writes to what is copied count by whole granules, in both modes."""
    script: list[Script] = [
        start(copy_mode=copy_mode),
        [
            ready(),
            query(),
            write(0),
            IN_SYNC,
            query(),
            write(128 * KiB, 64 * KiB),
            IN_SYNC,
            query(),
        ],
        [zero(256 * KiB, 128 * KiB), IN_SYNC, query(), images()],
        [COMPLETE, status("concluded"), query(), swapped()],
    ]
    assert_alike(folder, Setting(), script)


def test_len_and_offset_of_a_part_of_a_granule(folder: Path) -> None:
    """A synchronous write counts by its bytes, a copy by its granules."""
    script: list[Script] = [
        start(copy_mode="write-blocking"),
        [ready(), write(512, 100), IN_SYNC, query(), write(65530, 20), IN_SYNC, query(), images()],
    ]
    assert_alike(folder, Setting(), [script, [FORCE_CANCEL, status("concluded")]])


# quit


def _without_drain(lines: list[str]) -> list[str]:
    at = next(n for n, line in enumerate(lines) if line.startswith("-- quit"))
    drain = r'JOB_STATUS_CHANGE .*status="(paused|running|standby|ready)"'
    return lines[:at] + without(f"{drain}|BLOCK_EXPORT_DELETED")(lines[at:])


DRAINED_AT_QUIT = Difference(
    "no drain at quit",
    "QEMU pauses and resumes jobs on its way out, and says that exports go: here they are none",
    _without_drain,
)


@pytest.mark.parametrize("state", ["none", *WAYS])
def test_quit(folder: Path, state: str) -> None:
    """The jobs' last events, the answer, and then the process ends."""

    def gone(side: Side) -> None:
        process = side.server.process
        assert process and process.wait(5) == 0

    script: list[Script] = [WAYS.get(state, []), [do("quit"), call("the server ends", gone)]]
    assert_alike(folder, Setting(), script, PROGRESS, DRAINED_AT_QUIT)
