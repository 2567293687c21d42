"""Bitmaps, transactions and queries, compared with qemu-storage-daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.images import KiB, MiB
from support.parity import assert_alike
from support.paritydifferences import PROGRESS, Difference, substituted, without_step
from support.paritysides import Setting, Side
from support.paritysteps import (
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
    node,
    query,
    raw,
    ready,
    start,
    status,
    until,
    write,
    zero,
)

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


def on_target(verb: str, name: str, **more: Any) -> Step:
    return do(f"block-dirty-bitmap-{verb}", node="tgt", name=name, **more)


def test_bitmaps_of_a_mirrors_target(folder: Path) -> None:
    """They record what reaches the target, and after the pivot what guests write to it."""
    moved = do("block-dirty-bitmap-merge", node="tgt", target="b", bitmaps=["a"])
    from_source = {"node": "src", "name": "s"}
    merged = do("block-dirty-bitmap-merge", node="tgt", target="a", bitmaps=[from_source])
    script: list[Script] = [
        [bitmap("add", "s"), start(), ready(), on_target("add", "a"), bitmaps("tgt"), bitmaps()],
        [on_target("add", "a"), on_target("add", ""), on_target("add", "b", disabled=True)],
        [bitmap("clear", "a"), on_target("clear", "s"), on_target("remove", "nob")],
        [write(), in_sync(), bitmaps("tgt"), moved, bitmaps("tgt"), on_target("clear", "a")],
        [write(131072), in_sync(), merged, bitmaps("tgt"), on_target("disable", "b")],
        [transaction(target_action("add", "c"), ABORT), bitmaps("tgt")],
        [transaction(target_action("clear", "a"), ABORT), bitmaps("tgt")],
        [on_target("enable", "b"), on_target("add", "p", persistent=True)],
        [transaction(target_action("add", "c"), target_action("remove", "b")), bitmaps("tgt")],
        [do("job-complete", id="j"), status("concluded"), images(), bitmaps("tgt")],
        [write(262144), bitmaps("tgt"), on_target("remove", "a"), bitmaps("tgt")],
    ]
    assert_alike(folder, Setting(), script, OF_THE_DISK)


OF_THE_DISK = Difference(
    "the disk's own bitmaps",
    "after a pivot they are those of the node that it is served from, in QEMU of the old one",
    substituted(r"(, )?'[^']*name=\"s\"[^']*'", ""),
)


def test_a_bitmap_of_a_target_that_is_not_the_disk_after_all(folder: Path) -> None:
    """A soft cancel, and then another job."""
    script: list[Script] = [
        [start(), ready(), on_target("add", "a"), write(), in_sync(), bitmaps("tgt")],
        [do("block-job-cancel", device="j"), status("concluded"), images(), dismiss()],
        [bitmaps(), on_target("remove", "a"), do("blockdev-del", node_name="tgt")],
    ]
    assert_alike(folder, Setting(), script, GONE)


GONE = Difference(
    "bitmaps of a target whose job is over",
    "in QEMU they stay with the node, on which nothing is recorded any more",
    without_step("block-dirty-bitmap-remove"),
)


# Transactions


def action(verb: str, name: str = "", **more: Any) -> dict[str, Any]:
    if verb == "abort":
        return {"type": "abort", "data": {}}
    data = {"node": "src", **({"name": name} if name else {}), **more}
    return {"type": f"block-dirty-bitmap-{verb}", "data": data}


def target_action(verb: str, name: str) -> dict[str, Any]:
    return action(verb, name, node="tgt")


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


def test_what_a_node_is(folder: Path) -> None:
    """Every member that QEMU gives of an NBD node, with its value; of its image the sizes."""
    assert_alike(folder, Setting(), [[add(), node("tgt"), node("tgt", image=True)]])


def test_newest_job_first(folder: Path) -> None:
    """Concluded jobs are in the queries until they are dismissed."""
    piece = until(lambda job: job["offset"] >= 64 * KiB, "its first piece is copied", "k")
    again = [mirror(job_id="k", **SLOW), piece, query(progress=False)]
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
