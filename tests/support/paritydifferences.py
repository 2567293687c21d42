"""What is meant to differ between the transcripts of two servers: a `Difference` has a reason, and
takes out of both what differs, nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Rewrite = Callable[[list[str]], list[str]]


@dataclass(frozen=True, slots=True)
class Difference:
    """`rewrite` takes it out of a transcript; it is applied to both."""

    name: str
    why: str
    rewrite: Rewrite


def without(pattern: str) -> Rewrite:
    return lambda lines: [line for line in lines if not re.search(pattern, line)]


def substituted(pattern: str, replacement: str) -> Rewrite:
    return lambda lines: [re.sub(pattern, replacement, line) for line in lines]


def without_step(pattern: str) -> Rewrite:
    """What was said in the steps whose text matches."""

    def rewrite(lines: list[str]) -> list[str]:
        kept: list[str] = []
        is_left_out = False
        for line in lines:
            if line.startswith("--"):
                is_left_out = re.search(pattern, line) is not None
            elif is_left_out:
                continue
            kept.append(line)
        return kept

    return rewrite


def repeated_once(pattern: str) -> Rewrite:
    """Of all lines that match between two steps, the first."""

    def rewrite(lines: list[str]) -> list[str]:
        kept: list[str] = []
        for line in lines:
            if re.search(pattern, line):
                since = kept[_last_step(kept) :]
                if line in since:
                    continue
            kept.append(line)
        return kept

    return rewrite


def _answer_second(lines: list[str], pattern: str) -> list[str]:
    """In the steps that match, the answer comes after the first event."""
    kept = list(lines)
    for number, line in enumerate(kept):
        if re.match(pattern, line) and "<- return" in kept[number + 2 :]:
            answer = kept.index("<- return", number + 1)
            if not any(text.startswith("--") for text in kept[number + 1 : answer]):
                kept.insert(number + 2, kept.pop(answer))
    return kept


def _answer_third(lines: list[str]) -> list[str]:
    """After `created` and `running`, where READY comes before the next step."""
    kept = list(lines)
    for number, line in enumerate(kept):
        if line.startswith(
            ("-- blockdev-mirror", "-- drive-mirror")
        ) and 'status="running"' in "".join(kept[number + 2 : number + 3]):
            answer = kept.index("<- return", number + 1)
            if not any(text.startswith("--") for text in kept[number + 1 : answer]):
                kept.insert(number + 3, kept.pop(answer))
    return kept


def _last_step(lines: list[str]) -> int:
    return max((n for n, line in enumerate(lines) if line.startswith("--")), default=0)


BUSY = Difference(
    "busy while running",
    "QEMU shows whether the job's coroutine waits for I/O or sleeps just now; that is timing",
    substituted(r'busy=\w+(.*status="(?:running|ready)")', r"busy=?\1"),
)
PROGRESS = Difference(
    "len and offset",
    "how much was copied when the job was stopped is timing",
    substituted(r"\b(len|offset|current-progress|total-progress)=\d+", r"\1=?"),
)
ACTIVELY_SYNCED_AT_THE_END = Difference(
    "actively-synced of a job that is over",
    "QEMU goes on saying what it said last; nbdmirror says false, since no write is synchronous",
    substituted(r'actively-synced=\w+(.*status="concluded")', r"actively-synced=?\1"),
)
DRIVER_OF_A_FILE = Difference(
    "drv of a disk that is a file",
    "a disk of nbdmirror is one node, not two, so it is called `raw`",
    substituted(r'(node src: .*drv=)"file"', r'\1"raw"'),
)
BACK_OFF = Difference(
    "back-off under `ignore`",
    "QEMU tries again at once and floods thousands of events a second; rule 42 forbids spinning",
    without(r'BLOCK_JOB_ERROR action="ignore"'),
)
ONE_ERROR_A_STOP = Difference(
    "one BLOCK_JOB_ERROR a stop",
    "QEMU tells one for each operation in flight; nbdmirror one for each pause, as rule 21 says",
    repeated_once("BLOCK_JOB_ERROR"),
)

NEVER_RAN = Difference(
    "no events of a job that never was",
    "QEMU creates the job before it looks at some arguments, and so tells `created` and `null`",
    without(r'JOB_STATUS_CHANGE .*status="(created|null)"'),
)

CONNECT_TEXTS = Difference(
    "what cannot be connected to",
    "nbdmirror names the URI, and says what libnbd says; QEMU names the address alone",
    substituted(r"(GenericError: Failed to connect to ).*: ([^:]*)", r"\1X: \2"),
)

RESUME_ANSWER = Difference(
    "when the answer to resume comes",
    "after the change of the state; QEMU's job may already have had its next error by then",
    lambda lines: _answer_second(lines, r"-- (block-)?job-resume"),
)

START_ANSWER = Difference(
    "when the answer to blockdev-mirror comes",
    "where nothing is to be copied, QEMU's job may be READY before or after it: so it does by "
    "itself, from run to run",
    _answer_third,
)

ALWAYS = (BUSY, RESUME_ANSWER, START_ANSWER, ACTIVELY_SYNCED_AT_THE_END, DRIVER_OF_A_FILE)
