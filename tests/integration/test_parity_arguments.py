"""Arguments and errors of commands, compared with qemu-storage-daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.images import MiB
from support.parity import assert_alike
from support.paritydifferences import (
    CONNECT_TEXTS,
    NEVER_RAN,
    Difference,
    substituted,
    without_step,
)
from support.paritysides import Setting
from support.paritysteps import (
    SLOW,
    STARTED,
    Script,
    add,
    bitmaps,
    call,
    dismiss,
    do,
    images,
    mirror,
    query,
    raw,
    ready,
    start,
    status,
)

FORCE = [do("block-job-cancel", device="j", force=True), status("concluded")]
M = {"job-id": "j", "device": "src", "target": "tgt", "sync": "full"}


def given(**changed: Any) -> dict[str, Any]:
    """blockdev-mirror's arguments; None takes one away."""
    arguments: dict[str, Any] = {**M, **{k.replace("_", "-"): v for k, v in changed.items()}}
    return {key: value for key, value in arguments.items() if value is not None}


BAD_SPEEDS: list[Any] = [-1, 2**63, -(2**63) - 1, 1.5, "1", True, []]

WRONG: dict[str, list[dict[str, Any]]] = {
    "blockdev-mirror": [
        {},
        given(device=None),
        given(target=None),
        given(sync=None),
        given(foo=1),
        given(device=1),
        given(target=[]),
        given(sync=1),
        given(sync="bogus"),
        given(sync="dirty"),
        given(device="nope"),
        given(target="nope"),
        given(device="nope", target="nope"),
        given(target="src"),
        *[given(job_id=name) for name in ("", "1j", "a b", "a/b", "#x", "-a")],
        given(job_id=1),
        *[given(granularity=n) for n in (1, 256, 511, 1000, 67108865, 2**27, 2**31, 2**32, -1)],
        *[given(granularity=n) for n in ("64k", 1.5, True)],
        *[given(buf_size=n) for n in (-1, -(2**63), 2**63, "1", 1.0, False)],
        *[given(speed=n) for n in (2**63, "1", 1.5, 2.0, True)],
        given(on_source_error="bogus"),
        given(on_target_error="bogus"),
        given(on_target_error=1),
        given(copy_mode="active"),
        given(copy_mode=True),
        given(auto_finalize="no"),
        given(auto_dismiss=0),
        given(replaces=1),
        given(device="nope", granularity=1000),
        given(granularity=1000, buf_size=-1),
        given(job_id="1j", granularity=1000),
        given(job_id="1j", buf_size=-1),
        given(target="src", granularity=1000),
        given(target="src", buf_size=-1),
        given(target="src", filter_node_name="1x"),
        given(target="src", job_id="1j", speed=-1),
        given(replaces="nope", buf_size=-1),
        given(replaces="nope", granularity=1000),
        given(replaces="nope", target="src"),
        given(filter_node_name="src", job_id="1j"),
        given(filter_node_name="src", speed=-1),
        given(job_id="1j", speed=-1),
    ],
    "block-job-cancel": [
        {},
        {"device": "nope"},
        {"device": 1},
        {"device": "nope", "force": "yes"},
        {"device": "nope", "force": 1},
        {"id": "nope"},
        {"device": "nope", "foo": 1},
    ],
    "block-job-set-speed": [
        {},
        {"device": "nope"},
        {"speed": 1},
        {"device": "nope", "speed": 0},
        *[{"device": "nope", "speed": n} for n in BAD_SPEEDS],
    ],
    **{
        f"block-job-{verb}": [{}, {"device": "nope"}, {"device": 1}, {"id": "j"}]
        for verb in ("pause", "resume", "complete")
    },
    **{
        f"block-job-{verb}": [{}, {"id": "nope"}, {"id": 1}, {"device": "j"}]
        for verb in ("finalize", "dismiss")
    },
    **{
        f"job-{verb}": [{}, {"id": "nope"}, {"id": []}, {"id": "nope", "force": True}]
        for verb in ("pause", "resume", "complete", "cancel", "finalize", "dismiss")
    },
    "block-job-change": [
        {},
        {"id": "nope"},
        {"type": "mirror"},
        {"id": "nope", "type": "mirror"},
        {"id": "nope", "type": "bogus"},
        {"id": "nope", "type": 1},
        {"id": "nope", "type": "mirror", "copy-mode": "active"},
        {"id": "nope", "type": "mirror", "copy-mode": 1},
        {"id": "nope", "type": "mirror", "copy-mode": "write-blocking", "foo": 1},
        {"id": 1, "type": "mirror", "copy-mode": "write-blocking"},
        {"device": "nope", "type": "mirror", "copy-mode": "write-blocking"},
        {"id": "nope", "type": "mirror", "copy-mode": "write-blocking"},
    ],
    "blockdev-set-active": [
        {},
        {"active": 1},
        {"node-name": "src"},
        {"node-name": 1, "active": True},
        {"node-name": "nope", "active": True},
        {"node-name": "nope", "active": False},
        {"node-name": "", "active": False},
        {"device": "src", "active": False},
    ],
    "query-block-jobs": [{"foo": 1}],
    "query-jobs": [{"id": "j"}],
    "query-version": [{"x": None}],
    "query-named-block-nodes": [{"flat": 1}, {"flat": "yes"}],
    "quit": [{"now": True}],
    "nosuch": [{}, {"foo": 1}],
    "blockdev-del": [{}, {"node-name": "nope"}, {"node-name": 1}, {"id": "tgt"}],
    "blockdev-add": [
        {},
        {"driver": "bogus", "node-name": "n"},
        {"driver": 1, "node-name": "n"},
        {"driver": "nbd", "node-name": "n"},
        {"driver": "nbd", "node-name": "n", "server": 1},
        {"driver": "nbd", "node-name": "n", "server": {}},
        {"driver": "nbd", "node-name": "n", "server": {"type": "bogus"}},
        {"driver": "nbd", "node-name": "n", "server": {"type": "unix"}},
        {"driver": "nbd", "node-name": "n", "server": {"type": "unix", "path": 1}},
        {"driver": "nbd", "node-name": "n", "server": {"type": "unix", "path": "/x", "foo": 1}},
        {"driver": "nbd", "node-name": "n", "server": {"type": "inet", "host": "127.0.0.1"}},
        {"driver": "nbd", "node-name": "n", "server": {"type": "inet", "host": "h", "port": 1}},
        *[
            {"driver": "nbd", "server": {"type": "unix", "path": "/nope"}, **more}
            for more in (
                {},
                {"node-name": "1bad"},
                {"node-name": ""},
                {"node-name": "#block1"},
                {"node-name": "x" * 32},
                {"node-name": "src"},
                {"node-name": "tgt"},
                {"node-name": "n", "foo": 1},
                {"node-name": "n", "export": 1},
                {"node-name": "n", "reconnect-delay": -1},
                {"node-name": "n", "reconnect-delay": 2**32},
                {"node-name": "n", "reconnect-delay": "1"},
                {"node-name": "n", "open-timeout": "1"},
            )
        ],
        {"driver": "nbd", "node-name": "n", "server": {"type": "unix", "path": "/nope"}},
        {
            "driver": "nbd",
            "node-name": "n",
            "server": {"type": "inet", "host": "127.0.0.1", "port": "1"},
        },
    ],
    "block-dirty-bitmap-add": [
        {},
        {"node": "src"},
        {"name": "b"},
        {"node": "nope", "name": "b"},
        {"node": "src", "name": ""},
        {"node": "src", "name": "x" * 1024},
        *[
            {"node": "src", "name": "b", "granularity": n}
            for n in (0, 1, 256, 511, 1000, 2**32, -1, "64k")
        ],
        {"node": "src", "name": "b", "persistent": 1},
        {"node": "src", "name": "b", "disabled": "no"},
        {"node": "src", "name": "b", "foo": 1},
        {"node": 1, "name": "b"},
        {"node": "src", "name": []},
    ],
    **{
        f"block-dirty-bitmap-{verb}": [
            {},
            {"node": "src"},
            {"node": "nope", "name": "b"},
            {"node": "src", "name": "nob"},
            {"node": "src", "name": "nob", "foo": 1},
        ]
        for verb in ("remove", "clear", "enable", "disable")
    },
    "block-dirty-bitmap-merge": [
        {},
        {"node": "src", "target": "nob"},
        {"node": "nope", "target": "b", "bitmaps": ["c"]},
        {"node": "src", "target": "nob", "bitmaps": ["c"]},
        {"node": "src", "target": "nob", "bitmaps": "c"},
        {"node": "src", "target": "nob", "bitmaps": [1]},
        {"node": "src", "target": "nob", "bitmaps": [{"node": "src"}]},
    ],
    "transaction": [
        {},
        {"actions": {}},
        {"actions": [1]},
        {"actions": [{}]},
        {"actions": [{"type": "abort"}]},
        {"actions": [{"type": "bogus", "data": {}}]},
        {"actions": [{"type": "abort", "data": {}}]},
        {"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "src"}}]},
        {"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "src", "name": 1}}]},
        {"actions": [{"type": "block-dirty-bitmap-add", "data": {"x": 1}}]},
        {"actions": [{"type": "abort", "data": {"x": 1}}]},
        {"actions": [], "properties": {"completion-mode": "bogus"}},
        {"actions": [], "properties": {"foo": 1}},
        {"actions": [], "properties": {"completion-mode": "grouped"}},
        {"actions": []},
    ],
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_arguments(folder: Path, command: str) -> None:
    """Each is refused with QEMU's class and text, and nothing happens."""
    script: list[Script] = [
        [add(), [raw(command, arguments) for arguments in WRONG[command]], query(), bitmaps()],
        [images(target=False)],
    ]
    assert_alike(folder, Setting(), script, CONNECT_TEXTS, ALTERNATE_TEXT)


ALTERNATE_TEXT = Difference(
    "the name of an alternate in an array",
    "QEMU has lost it by then and says 'null'",
    substituted(r"for '(null|bitmaps\[0\])', expected: BlockDirtyBitmapOrStr", "for X"),
)


def test_the_job_id_defaults_to_the_disk(folder: Path) -> None:
    """QEMU takes the name of the device that has the node: nbdmirror's disks have one."""
    difference = Difference(
        "job-id may be left out",
        "a node of the daemon has no device name, so it refuses; NAME is the device here (qmp.md)",
        without_step("blockdev-mirror"),
    )
    script: list[Script] = [[add(), raw("blockdev-mirror", given(job_id=None))]]
    _, ours = assert_alike(folder, Setting(), script, difference)
    assert ours.failure is None


def test_what_is_busy(folder: Path) -> None:
    second = call("a second target", lambda side: side.start_target("second", MiB))
    script: list[Script] = [
        [second, add("other", "second"), start(**SLOW), STARTED],
        [raw("blockdev-mirror", given())],
        [raw("blockdev-mirror", given(job_id="k"))],
        [raw("blockdev-mirror", given(job_id="k", target="other"))],
        [raw("blockdev-mirror", given(job_id="k", device="other", target="src"))],
        [do("blockdev-del", node_name="tgt"), do("blockdev-del", node_name="src")],
        [FORCE, raw("blockdev-mirror", given())],  # the concluded job has its id still
        [dismiss(), do("blockdev-del", node_name="tgt"), do("blockdev-del", node_name="tgt")],
        [add("tgt"), mirror(), ready(), do("block-job-complete", device="j"), status("concluded")],
        [do("blockdev-del", node_name="tgt"), add("tgt", "second")],
    ]
    assert_alike(folder, Setting(), script, BUSY_TEXTS)


BUSY_TEXTS = Difference(
    "what a busy disk is called",
    "the disk is no graph of nodes: there is no filter on top of it and so no root to need",
    substituted(r"Need a root block node|Node 'src' is busy: .*|Node 'other' is not a disk.*", "X"),
)


def test_a_target_that_cannot_be_written(folder: Path) -> None:
    """At blockdev-add, as for any node that is opened for writing."""
    assert_alike(folder, Setting(target_read_only=True), [[add(), query()]])


def test_options_of_every_node(folder: Path) -> None:
    """What management tools send with each blockdev-add, whatever the driver."""
    options: list[dict[str, Any]] = [
        {"read_only": False},
        {"auto_read_only": False},
        {"discard": "unmap"},
        {"discard": "bogus"},
        {"cache": {"direct": False, "no-flush": False}},
        {"cache": {"direct": 1}},
        {"detect_zeroes": "off"},
        {"force_share": False},
    ]
    script: list[Script] = [[add(**more), do("blockdev-del", node_name="tgt")] for more in options]
    assert_alike(folder, Setting(), script)


@pytest.mark.rule(38)
def test_a_negative_speed_leaves_no_job(folder: Path) -> None:
    script: list[Script] = [[add(), mirror(speed=-1), query(), FORCE[:1]]]
    assert_alike(folder, Setting(), script, NEVER_RAN)


def test_sync_modes_that_qemu_has_not(folder: Path) -> None:
    """QEMU knows the words and refuses the modes; nbdmirror has them (its own tests)."""
    modes = Difference(
        "sync=incremental and sync=bitmap",
        "7.2 (and newer) refuses; the issue asks for them, with the texts of blockdev-backup",
        without_step("blockdev-mirror"),
    )
    script: list[Script] = [
        [add()],
        [raw("blockdev-mirror", given(sync=sync)) for sync in ("incremental", "bitmap")],
        [query()],
    ]
    assert_alike(folder, Setting(), script, modes)
