"""Which QEMU is installed, and what QEMU itself changed between the versions that the conversations
are held with: 7.2 (Debian 12), 10.0 (Debian 13) and 11.1.

nbdmirror does as the newest of them. All that older ones do otherwise, and what newer ones do that
nbdmirror does not, is here, and nowhere else.
"""

from __future__ import annotations

import functools
import re
import subprocess

from support.paritydifferences import Difference, Rewrite, substituted, without_step

Version = tuple[int, int]

SINCE: dict[str, Version] = {
    "block-job-change": (8, 2),
    "query-block-jobs actively-synced": (8, 2),
    "query-block-jobs type": (8, 2),
    "blockdev-set-active": (10, 0),
    "node active": (10, 0),
    "node children": (10, 1),
    "target-is-zero": (10, 1),
    "deprecated block-job-complete and others": (10, 1),
    "node limits": (10, 2),
    "query-block flat": (11, 0),
}
"""What came after 7.2, of what nbdmirror has."""


@functools.cache
def installed() -> Version:
    """Of qemu-storage-daemon."""
    said = subprocess.run(
        ["qemu-storage-daemon", "--version"], capture_output=True, text=True, check=True
    ).stdout
    found = re.match(r"qemu-storage-daemon version (\d+)\.(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


def has(what: str) -> bool:
    return installed() >= SINCE[what]


def _before(version: Version, rewrite: Rewrite) -> Rewrite:
    return lambda lines: rewrite(lines) if installed() < version else lines


def _without_drains(lines: list[str]) -> list[str]:
    """In the steps in which QEMU drains, a pause that is over at once."""
    drains = "transaction" if installed() < (10, 0) else "(transaction|blockdev-|drive-)"
    kept: list[str] = []
    step, number = "", 0
    while number < len(lines):
        pair = " ".join(lines[number : number + 2])
        if lines[number].startswith("--"):
            step = lines[number]
        if re.match(f"-- {drains}", step) and re.fullmatch(_DRAIN, pair):
            number += 2
            continue
        kept.append(lines[number])
        number += 1
    return kept


_CHANGE = r'<- JOB_STATUS_CHANGE id="[^"]+" status='
_DRAIN = rf'{_CHANGE}"(?:paused" {_CHANGE}"running|standby" {_CHANGE}"ready)"'

CHANGED = (
    Difference(
        "the command block-job-change",
        "QEMU has it since 8.2",
        _before(SINCE["block-job-change"], without_step("^-- block-job-change")),
    ),
    Difference(
        "actively-synced",
        "query-block-jobs has it since QEMU 8.2",
        _before(
            SINCE["query-block-jobs actively-synced"], substituted(r"actively-synced=\S+ ", "")
        ),
    ),
    Difference(
        "the command blockdev-set-active",
        "QEMU has it since 10.0",
        _before(SINCE["blockdev-set-active"], without_step("^-- blockdev-set-active")),
    ),
    Difference(
        "what cannot be grouped",
        "QEMU before 8.1 wrote 'Transaction' with a capital letter, and let an abort be grouped",
        _before(
            (8, 1),
            lambda lines: substituted("Transaction property", "transaction property")(
                without_step('"type": "abort".*grouped')(lines)
            ),
        ),
    ),
    Difference(
        "no drain",
        "QEMU pauses and resumes jobs for a transaction, and since 10.0 while nodes come and go, "
        "and tells that; nbdmirror has no graph to drain",
        _without_drains,
    ),
    Difference(
        "nodes' newer members",
        "`active` since QEMU 10.0, `children` since 10.1, `limits` since 10.2",
        lambda lines: [_without_members(line) for line in lines],
    ),
)
"""In force in each conversation."""


def _without_members(line: str) -> str:
    for name in ("active", "children", "limits"):
        if line.startswith("   node ") and not has(f"node {name}"):
            line = re.sub(rf" {name}=\S+", "", line)
    return line
