"""query-qmp-schema: what it says is what QEMU's says, and what commands return and events carry.

Management tools decide by it what they ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clients import connected
from support.fixtures import Start
from support.images import MiB, assert_identical, make_image, make_noise
from support.paritysides import StorageDaemon
from support.parityversions import has
from support.qmpclient import Qmp
from support.servers import Nbdmirror, QemuNbd

from nbdmirror.qmp.commands import COMMANDS
from nbdmirror.qmp.introspection import SCHEMA_INFO
from nbdmirror.qmp.results import EVENTS
from nbdmirror.qmp.schema import NOTHING

Entry = dict[str, Any]
DEPRECATED = {name for name, command in COMMANDS.items() if command.is_deprecated}
Schema = dict[str, Entry]

NODES = ("query-block -> [] inserted", "query-named-block-nodes -> []")

OWN = {
    "query-status": "QEMU's, not the storage daemon's",
    "blockdev-mirror bitmap": "Proxmox's patch",
    "blockdev-mirror bitmap-mode": "Proxmox's patch",
    "blockdev-mirror on-cbw-error": "of points, as the filter copy-before-write has it",
    "blockdev-mirror unmap": "drive-mirror has it",
    "drive-mirror bitmap": "Proxmox's patch",
    "drive-mirror bitmap-mode": "Proxmox's patch",
    "drive-mirror on-cbw-error": "of points, as the filter copy-before-write has it",
    "drive-mirror target-is-zero": "as blockdev-mirror has it",
    "transaction actions [] type=blockdev-mirror": "several disks begin together",
    "transaction actions [] type=drive-mirror": "the same",
    "transaction actions [] type=job-complete": "several disks end together",
    "transaction actions [] type=block-job-complete": "the same",
    "transaction actions [] type=block-job-cancel": "the same",
}
"""What no QEMU's storage daemon has, beside names that begin with x-nbdmirror-."""

NEWER = {
    "block-job-change": {"block-job-change"},
    "query-block-jobs actively-synced": {"query-block-jobs -> [] type=mirror"},
    "blockdev-set-active": {"blockdev-set-active"},
    "node active": {
        "blockdev-add active",
        "blockdev-add driver=raw file active",
        *(f"{nodes} active" for nodes in NODES),
    },
    "node children": {f"{nodes} children" for nodes in NODES},
    "node limits": {f"{nodes} image limits" for nodes in NODES},
    "target-is-zero": {
        "blockdev-mirror target-is-zero",
    },
    "query-block flat": {"query-block flat"},
}
"""What the installed one may lack, by what parityversions.py calls it."""


NOT_HERE = {
    "other kinds of jobs": "block-commit block-stream blockdev-backup drive-backup blockdev-create"
    " x-blockdev-amend",
    "images and their graph": "blockdev-snapshot blockdev-snapshot-sync change-backing-file"
    " blockdev-snapshot-internal-sync blockdev-snapshot-delete-internal-sync blockdev-reopen"
    " block_resize x-blockdev-change x-blockdev-set-iothread x-debug-query-block-graph",
    "exports, which `serve` makes": "block-export-add block-export-del nbd-server-add"
    " nbd-server-remove nbd-server-start nbd-server-stop",
    "objects and character devices": "object-add object-del qom-get qom-list qom-list-properties"
    " qom-list-types qom-set chardev-add chardev-change chardev-remove chardev-send-break"
    " query-chardev query-chardev-backends ringbuf-read ringbuf-write",
    "statistics": "query-blockstats block-set-write-threshold",
    "debugging": "x-debug-block-dirty-bitmap-sha256",
}
"""What the storage daemon has and nbdmirror has not. All that a mirror needs is there."""


@pytest.fixture
def schemas(folder: Path, start: Start) -> tuple[Schema, Schema]:
    """QEMU's and ours, by name."""
    image = make_image(folder / "disk.img", MiB)
    daemon = start(StorageDaemon(folder, f"driver=file,filename={image}"))
    server = start(Nbdmirror(folder, f"src={image}", bare=True, options=("read-only=true",)))
    found = []
    for path in (daemon.qmp_path, server.qmp_path):
        with Qmp(path) as qmp:
            found.append({entry["name"]: entry for entry in qmp.execute("query-qmp-schema")})
    daemon.kill()
    return found[0], found[1]


class Comparison:
    """Every type of ours beside QEMU's: the same, or a part of it."""

    def __init__(self, qemu: Schema, ours: Schema) -> None:
        self.qemu, self.ours = qemu, ours
        self.extra: list[str] = []
        self.wrong: list[str] = []

    def types(self, qemu: str, ours: str, where: str) -> None:
        a, b = self.qemu[qemu], self.ours[ours]
        if a["meta-type"] != b["meta-type"]:
            self.wrong.append(f"{where}: {a['meta-type']}, {b['meta-type']}")
        elif b["meta-type"] == "builtin" and a != b:
            self.wrong.append(f"{where}: {a['json-type']}, {b['json-type']}")
        elif b["meta-type"] == "enum":
            values = set(b["values"]) - set(a["values"])
            self.wrong += [f"{where}: value {value}" for value in values if value not in OWN_VALUES]
        elif b["meta-type"] == "array":
            self.types(a["element-type"], b["element-type"], f"{where} []")
        elif b["meta-type"] == "alternate":
            by_kind = {self.qemu[x["type"]]["meta-type"]: x["type"] for x in a["members"]}
            for y in b["members"]:
                self.types(by_kind[self.ours[y["type"]]["meta-type"]], y["type"], where)
        elif b["meta-type"] == "object":
            self.objects(a, b, where)

    def objects(self, a: Entry, b: Entry, where: str) -> None:
        there = {member["name"]: member for member in a["members"]}
        for member in b["members"]:
            name = member["name"]
            inside = f"{where} {name}"
            if name not in there:
                self.extra.append(inside)
                continue
            was, is_ = "default" in there[name], "default" in member
            if was is not is_ and not (was and " ->" in where):  # what is always there may be
                self.wrong.append(f"{inside}: optional on one side")
            self.types(there[name]["type"], member["type"], inside)
        if a.get("tag") != b.get("tag"):
            self.wrong.append(f"{where}: tags {a.get('tag')}, {b.get('tag')}")
        cases = {variant["case"]: variant["type"] for variant in a.get("variants", ())}
        for variant in b.get("variants", ()):
            case = f"{where} {b['tag']}={variant['case']}"
            if variant["case"] in cases:
                self.types(cases[variant["case"]], variant["type"], case)
            else:
                self.extra.append(case)


OWN_VALUES = {"blockdev-mirror", "drive-mirror", "job-complete"}
OWN_VALUES |= {"block-job-complete", "block-job-cancel"}
"""The transaction's actions, as in OWN."""


UNTYPED = {"query-block-jobs -> [] type: builtin, enum", "query-block-jobs -> []: tags None, type"}
"""In 7.2 the type of a block job is any string."""


OURS = {f"{name} copy-mode: value points" for name in ("blockdev-mirror", "drive-mirror")}
"""Values that QEMU does not have, of arguments that it has."""

OF_CHANGE = "block-job-change type=mirror"


def test_commands_and_events_are_qemus(schemas: tuple[Schema, Schema]) -> None:
    qemu, ours = schemas
    comparison = Comparison(qemu, ours)
    for name, entry in ours.items():
        if entry["meta-type"] not in ("command", "event"):
            continue
        if name not in qemu:
            comparison.extra.append(name)
            continue
        assert qemu[name]["meta-type"] == entry["meta-type"]
        comparison.types(qemu[name]["arg-type"], entry["arg-type"], name)
        if entry["meta-type"] == "command":
            comparison.types(qemu[name]["ret-type"], entry["ret-type"], f"{name} ->")
    untyped = set() if has("query-block-jobs type") else UNTYPED
    ours_too = {f"{OF_CHANGE} copy-mode: value points"} if has("block-job-change") else set()
    assert set(comparison.wrong) == untyped | OURS | ours_too, "\n".join(comparison.wrong)
    extra = {name for name in comparison.extra if "nbdmirror" not in name.lower()}
    newer = set().union(*(names for what, names in NEWER.items() if not has(what)))
    own_too = {f"{OF_CHANGE} on-cbw-error"} if has("block-job-change") else set()
    assert extra == set(OWN) | newer | own_too


def test_what_qemu_deprecates(schemas: tuple[Schema, Schema]) -> None:
    deprecated = [
        {name for name, entry in schema.items() if "deprecated" in entry.get("features", ())}
        for schema in schemas
    ]
    assert deprecated[1] == DEPRECATED
    if has("deprecated block-job-complete and others"):
        assert deprecated[0] & set(COMMANDS) == DEPRECATED


def test_commands_that_are_not_here(schemas: tuple[Schema, Schema]) -> None:
    commands = [
        {name for name, entry in schema.items() if entry["meta-type"] == "command"}
        for schema in schemas
    ]
    named = [name for names in NOT_HERE.values() for name in names.split()]
    missing = commands[0] - commands[1] - {"query-qmp-schema"}
    assert missing - {"qom-list-get"} == set(named)  # QEMU has that since 11


def test_no_type_is_missing_or_without_use(schemas: tuple[Schema, Schema]) -> None:
    _, ours = schemas
    for entry in ours.values():
        SCHEMA_INFO.check(entry)
    used = {name for name, entry in ours.items() if entry["meta-type"] in ("command", "event")}
    left = list(used)
    while left:
        for name in references(ours[left.pop()]):
            assert name in ours
            if name not in used:
                used.add(name)
                left.append(name)
    assert used == set(ours)
    commands = {name for name, entry in ours.items() if entry["meta-type"] == "command"}
    assert commands == {"qmp_capabilities", *COMMANDS}


def references(entry: Entry) -> Iterator[str]:
    for key in ("arg-type", "ret-type", "element-type"):
        if key in entry:
            yield entry[key]
    if entry["meta-type"] in ("object", "alternate"):
        for member in [*entry["members"], *entry.get("variants", ())]:
            yield member["type"]


JOB_MAP = "x-nbdmirror-query-job-map"
"""The only query that needs arguments."""

POINT, ACK = "x-nbdmirror-point", "x-nbdmirror-point-ack"
"""Are no queries: points/test_asked_points.py and snapshots/ in tests/integration/mirror/
check their answers."""


def test_answers_and_events_are_as_it_says(start: Start, folder: Path) -> None:
    """In every state of a job, with a bitmap, before and after a pivot, and of a job that fails."""
    disk = make_image(folder / "disk.img", MiB)
    target = start(QemuNbd(folder, make_noise(folder / "target.img", MiB)))
    small = start(QemuNbd(folder, make_noise(folder / "small.img", MiB // 2)))
    server = start(Nbdmirror(folder, f"src={disk}", bare=True))
    server.allowed = ["different sizes|has [0-9]+ bytes"]
    qmp = server.qmp

    def ask() -> None:
        for name, command in COMMANDS.items():
            if command.returns is NOTHING or name in (POINT, ACK):
                continue
            if name != JOB_MAP:
                command.returns.check(qmp.execute(name), name)
                continue
            for job in qmp.execute("query-jobs"):
                if job["status"] != "concluded":
                    answer = qmp.execute(name, id=job["id"], cells=8)
                    command.returns.check(answer, name)

    ask()
    qmp.execute("block-dirty-bitmap-add", node="src", name="b")
    qmp.add_target("tgt", target)
    qmp.add_target("small", small)
    qmp.start_mirror("small", device="src", job_id="k", auto_dismiss=False)
    qmp.wait_status("concluded", "k")
    qmp.start_mirror("tgt", device="src", speed=1, auto_finalize=False, auto_dismiss=False)
    ask()
    qmp.execute("block-job-pause", device="j")
    qmp.wait_status("paused")
    ask()
    qmp.execute("block-job-resume", device="j")
    qmp.execute("block-job-set-speed", device="j", speed=0)
    qmp.wait_ready()
    ask()
    qmp.execute("block-job-complete", device="j")
    qmp.wait_status("pending")
    ask()
    qmp.execute("block-job-finalize", id="j")
    qmp.wait_status("concluded")
    ask()
    qmp.execute("block-job-dismiss", id="j")
    ask()
    told = {event["event"] for event in qmp.events}
    for event in qmp.events:
        EVENTS[event["event"]].check(event.get("data", {}), event["event"])
    assert told >= {"X_NBDMIRROR_SIZES_DIFFER", "X_NBDMIRROR_PIVOTED", "BLOCK_JOB_PENDING"}
    with connected(server.uri("src")) as guest:
        assert_identical(bytes(guest.pread(MiB, 0)), target.image)
