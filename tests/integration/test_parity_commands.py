"""Arguments, errors, bitmaps and transactions, compared with qemu-storage-daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from images import MiB
from parity import assert_alike
from paritydifferences import (
    CONNECT_TEXTS,
    NEVER_RAN,
    PROGRESS,
    Difference,
    substituted,
    without_step,
)
from paritysides import Setting, Side
from paritysteps import (
    SLOW,
    Script,
    Step,
    add,
    bitmaps,
    call,
    dismiss,
    do,
    event,
    flush,
    images,
    in_sync,
    mirror,
    query,
    raw,
    ready,
    start,
    status,
    write,
    zero,
)

FORCE = [do("block-job-cancel", device="j", force=True), status("concluded")]
M = {"job-id": "j", "device": "src", "target": "tgt", "sync": "full"}


def given(**changed: Any) -> dict[str, Any]:
    """blockdev-mirror's arguments; None takes one away."""
    arguments: dict[str, Any] = {**M, **{k.replace("_", "-"): v for k, v in changed.items()}}
    return {key: value for key, value in arguments.items() if value is not None}


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
        *[{"device": "nope", "speed": n} for n in (-1, 2**63, -(2**63) - 1, 1.5, "1", True, [])],
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
        "a node of the daemon has no device name, so it refuses; INTERFACE 1: NAME is the device",
        without_step("blockdev-mirror"),
    )
    script: list[Script] = [[add(), raw("blockdev-mirror", given(job_id=None))]]
    _, ours = assert_alike(folder, Setting(), script, difference)
    assert ours.failure is None


def test_what_is_busy(folder: Path) -> None:
    second = call("a second target", lambda side: side.start_target("second", MiB))
    script: list[Script] = [
        [second, add("other", "second"), start(**SLOW)],
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


# Bitmaps


def bitmap(verb: str, name: str, **more: Any) -> Step:
    return do(f"block-dirty-bitmap-{verb}", node="src", name=name, **more)


def merge(target: str, *sources: Any) -> Step:
    return do("block-dirty-bitmap-merge", node="src", target=target, bitmaps=list(sources))


def test_bitmaps_record_what_a_guest_writes(folder: Path) -> None:
    script: list[Script] = [
        [bitmap("add", "a"), bitmap("add", "b", granularity=512), bitmap("add", "a")],
        [bitmap("add", "c", disabled=True, granularity=4096, persistent=False), bitmaps()],
        [write(1000, 100), bitmaps(), zero(128 * 1024, 65536), flush(), bitmaps()],
        [bitmap("disable", "b"), bitmap("disable", "b"), bitmap("enable", "c"), bitmaps()],
        [write(300_000, 70_000), write(MiB - 1, 1), bitmaps()],
        [bitmap("clear", "b"), bitmap("clear", "a"), bitmaps(), merge("a", "c"), bitmaps()],
        [merge("c", "a"), merge("c", "c"), merge("b", "c", {"node": "src", "name": "a"})],
        [merge("a", "nob"), merge("a", "b", "nob"), bitmaps()],
        [merge("a", {"node": "nope", "name": "a"}), merge("a", {"node": "src", "name": "nob"})],
        [bitmap("remove", "a"), bitmap("remove", "a"), bitmap("enable", "a"), bitmaps()],
        [bitmap("add", "x" * 1023), bitmap("add", "y" * 1024), bitmap("remove", "x" * 1023)],
        [bitmap("add", "big", granularity=2**31), bitmaps()],
        [bitmap("add", "p", persistent=True)],
    ]
    assert_alike(folder, Setting(), script)


def test_bitmaps_go_on_during_a_mirror_and_stay_with_the_old_node(folder: Path) -> None:
    script: list[Script] = [
        [bitmap("add", "a"), write(), start(), ready(), write(65536), in_sync(), bitmaps()],
        [bitmap("clear", "a"), bitmap("add", "b"), write(131072), in_sync(), bitmaps()],
        [merge("b", "a"), bitmap("disable", "a"), bitmaps()],
        [do("block-job-cancel", device="j"), status("concluded"), bitmaps(), images(), dismiss()],
        [mirror(), ready(), do("block-job-complete", device="j"), status("concluded")],
        [images()],
    ]
    assert_alike(folder, Setting(), script)


# Transactions


def action(verb: str, name: str = "", **more: Any) -> dict[str, Any]:
    if verb == "abort":
        return {"type": "abort", "data": {}}
    data = {"node": "src", **({"name": name} if name else {}), **more}
    return {"type": f"block-dirty-bitmap-{verb}", "data": data}


def transaction(*actions: dict[str, Any], mode: str = "") -> Step:
    properties = {"properties": {"completion-mode": mode}} if mode else {}
    return raw("transaction", {"actions": list(actions), **properties})


ABORT = action("abort")


def test_transactions_of_bitmaps(folder: Path) -> None:
    """Done whole, or undone whole: what was recorded before is there again."""
    into_a = action("merge", target="a", bitmaps=["b"])
    script: list[Script] = [
        [transaction(action("add", "a"), action("add", "b", granularity=4096)), bitmaps()],
        [write(5000, 5000), bitmap("disable", "b"), write(400_000, 1000), bitmaps()],
        [transaction(action("add", "c"), ABORT), bitmaps()],
        [transaction(action("clear", "a"), ABORT), bitmaps()],
        [transaction(action("remove", "a"), ABORT), bitmaps()],
        [transaction(action("disable", "a"), action("enable", "b"), ABORT), bitmaps()],
        [transaction(action("clear", "a"), into_a, ABORT), bitmaps()],
        [transaction(action("clear", "a"), action("add", "b")), bitmaps()],
        [transaction(action("clear", "a"), action("clear", "nob"), action("add", "c")), bitmaps()],
        [transaction(action("add", "c"), action("disable", "c"))],
        [transaction(action("merge", target="c", bitmaps=["a", "b"])), bitmaps()],
        [transaction(action("clear", "a"), action("remove", "b")), bitmaps()],
        [transaction(ABORT), transaction(), transaction(action("add", "d"), mode="individual")],
        [transaction(ABORT, mode="grouped")],
        [transaction(action("add", "e"), mode="grouped"), transaction(mode="grouped"), bitmaps()],
        [write(700_000, 10), bitmaps()],
    ]
    assert_alike(folder, Setting(), script)


def test_remove_then_add_in_one_transaction(folder: Path) -> None:
    """The removal is carried out at the commit only, so that it can be undone."""
    script: list[Script] = [
        [bitmap("add", "a"), write()],
        [transaction(action("remove", "a"), action("add", "a")), bitmaps()],
    ]
    assert_alike(folder, Setting(), script)


# Queries


def test_query_block_nodes_keys(folder: Path) -> None:
    """Every member that QEMU gives of an NBD node, with the same type; of the values those that
    are not names of files."""

    def look(side: Side) -> None:
        nodes = side.qmp.execute("query-named-block-nodes", flat=True)
        (info,) = [node for node in nodes if node["node-name"] == "tgt"]
        shapes = {
            key: value if isinstance(value, bool | int) else type(value).__name__
            for key, value in info.items()
        }
        side.qmp.log[-1] = {"note": str(sorted(shapes.items()))}
        side.qmp.log.append({"note": str(info["image"]["virtual-size"])})

    assert_alike(folder, Setting(), [[add(), call("look", look)]])


def test_newest_job_first(folder: Path) -> None:
    """Concluded jobs are in the queries until they are dismissed."""
    again = [mirror(job_id="k", **SLOW), query(progress=False)]
    script: list[Script] = [
        [start(), ready(), do("block-job-cancel", device="j"), status("concluded"), again],
        [do("job-cancel", id="k"), status("concluded", "k"), query(progress=False)],
        [do("job-dismiss", id="j"), query(progress=False), do("block-job-dismiss", id="k")],
        [query()],
    ]
    assert_alike(folder, Setting(), script)


def test_a_job_in_pending_may_be_followed_by_events(folder: Path) -> None:
    """The guest writes in PENDING; finalize brings that along."""
    held = Difference(
        "the guest is not held in PENDING",
        "QEMU keeps the guest's writes back until finalize, for ever if need be; nbdmirror goes on "
        "mirroring and quiesces again at finalize (rule 41): so it alone is written to here",
        PROGRESS.rewrite,
    )
    script: list[Script] = [
        [start(auto_finalize=False), ready(), do("block-job-complete", device="j")],
        [event("BLOCK_JOB_PENDING", id="j"), call("a guest writes", _write_if_ours)],
        [do("block-job-finalize", id="j"), status("concluded"), query()],
        [call("equal", _equal_if_ours)],
    ]
    assert_alike(folder, Setting(), script, held)


def _write_if_ours(side: Side) -> None:
    if side.kind == "nbdmirror":
        side.guest.pwrite(b"\x77" * 100_000, 12345)


def _equal_if_ours(side: Side) -> None:
    if side.kind == "nbdmirror":
        source, target = side.source_image.read_bytes(), side.targets["tgt"][1].read_bytes()
        assert source == target
        assert source[12345:112345] == b"\x77" * 100_000
