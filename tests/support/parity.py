"""One conversation, two servers: what the comparison with qemu-storage-daemon is made of.

A script is a list of steps (paritysteps.py). `converse` holds it with qemu-storage-daemon and with
nbdmirror at the same time (paritysides.py), and returns two transcripts: every answer and every
event in the order of arrival, by step. `assert_alike` demands that they are the same, but for what
is meant to differ (paritydifferences.py), and what differs between QEMU's own versions
(parityversions.py).
"""

from __future__ import annotations

import contextlib
import difflib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.paritydifferences import ALWAYS, Difference
from support.paritysides import KINDS, Kind, Setting, Side
from support.paritysteps import WAIT, Script, Step, shown
from support.parityversions import CHANGED

SCRIPT_S_MAX = 50.0


@dataclass(slots=True)
class Transcript:
    kind: Kind
    lines: list[str] = field(default_factory=list)
    failure: BaseException | None = None


def converse(folder: Path, setting: Setting, script: Script) -> tuple[Transcript, Transcript]:
    """Hold the conversation with both, at the same time."""
    transcripts = [Transcript(kind) for kind in KINDS]
    threads = []
    for transcript in transcripts:
        place = folder / transcript.kind[0]
        place.mkdir()
        thread = threading.Thread(
            target=_hold, args=(transcript, place, setting, list(_flat(script))), daemon=True
        )
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join(SCRIPT_S_MAX)
        assert not thread.is_alive(), "a conversation does not end"
    return transcripts[0], transcripts[1]


def _flat(script: Script) -> Iterator[Step]:
    for step in script:
        if isinstance(step, Step):
            yield step
        else:
            yield from _flat(step)


def _hold(transcript: Transcript, folder: Path, setting: Setting, steps: list[Step]) -> None:
    log: list[dict[str, Any]] = []
    try:
        with Side(transcript.kind, folder, setting) as side:
            side.qmp.forget()
            log = side.qmp.log
            for step in steps:
                log.append({"step": step.text})
                step.run(side)
            with contextlib.suppress(OSError):  # it may have been told to quit
                side.qmp.execute("query-jobs")  # what was on its way arrives before the answer
    except BaseException as error:  # noqa: BLE001 - raised again by assert_alike
        transcript.failure = error
    lines = [line.replace(str(folder), "DIR") for line in map(_line, log)]
    if transcript.failure is None:
        lines = [line for line in lines if not line.startswith(f"-- {WAIT}")]
    transcript.lines = list(filter(None, lines))


def _line(message: Mapping[str, Any]) -> str:
    if "step" in message:
        return f"-- {message['step']}"
    if "note" in message:
        return f"   {message['note']}"
    if "event" in message:
        name = message["event"]
        data = {k: v for k, v in message["data"].items() if not k.startswith("x-nbdmirror-")}
        return "" if name.startswith("X_NBDMIRROR_") else f"<- {name} {shown(data)}"
    if "error" in message:
        return f"<- {message['error']['class']}: {message['error']['desc']}"
    return "<- return"


def assert_alike(
    folder: Path, setting: Setting, script: Script, *differences: Difference
) -> tuple[Transcript, Transcript]:
    """Both sides did every step, and said the same, but for the named differences."""
    both = converse(folder, setting, script)
    for transcript in both:
        for difference in (*ALWAYS, *CHANGED, *differences):
            transcript.lines = difference.rewrite(transcript.lines)
    qsd, ours = both
    for transcript in both:
        if transcript.failure is not None:
            text = "\n".join(difflib.unified_diff(qsd.lines, ours.lines, "qsd", "nbdmirror", n=6))
            reason = str(transcript.failure).split("; heard")[0]
            pytest.fail(
                f"{transcript.kind}: {type(transcript.failure).__name__}: {reason}\n"
                f"{text or _tail(transcript)}",
                pytrace=False,
            )
    if qsd.lines != ours.lines:
        text = "\n".join(difflib.unified_diff(qsd.lines, ours.lines, "qsd", "nbdmirror", n=8))
        pytest.fail(f"they differ:\n{text}", pytrace=False)
    return both


def _tail(transcript: Transcript) -> str:
    return "\n".join(transcript.lines[-30:])
