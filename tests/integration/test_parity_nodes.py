"""Nodes: how they are added, shown, used and taken away, compared with qemu-storage-daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.images import MiB
from support.parity import assert_alike
from support.paritydifferences import (
    CONNECT_TEXTS,
    NEVER_RAN,
    PROGRESS,
    Difference,
    substituted,
    without_step,
)
from support.paritysides import Setting, Side
from support.paritysteps import (
    Script,
    Step,
    add,
    call,
    do,
    drive,
    images,
    is_served,
    mirror,
    node,
    note,
    query,
    raw_node,
    ready,
    start,
    status,
    untold,
    write,
)

DELETE = do("blockdev-del", node_name="tgt")
FORCE = [do("block-job-cancel", device="j", force=True), status("concluded")]
DISMISS = do("job-dismiss", id="j")


# blockdev-add


@pytest.mark.parametrize("is_export_read_only", [False, True])
def test_a_read_only_node_is_not_written_to(folder: Path, is_export_read_only: bool) -> None:
    """By the export, or by the user's word alone: the data of an export that could be written to
    are protected as well."""
    script: list[Script] = [
        [add(), DELETE],
        [add(read_only=True), node(), mirror(), query(), images(equal=False), DELETE],
        [add(auto_read_only=True, read_only=True), node(), mirror(), query(), DELETE],
    ]
    if is_export_read_only:
        script += [[add(auto_read_only=True), mirror(), query(), images(equal=False)]]
    setting = Setting(target_read_only=is_export_read_only)
    assert_alike(folder, setting, script, NEVER_RAN)


def test_options_are_shown_again(folder: Path) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"read_only": False, "auto_read_only": True},
        {"cache": {"direct": True}},
        {"cache": {"direct": False, "no-flush": True}},
        {"detect_zeroes": "on"},
        {"detect_zeroes": "unmap"},
        {"detect_zeroes": "unmap", "discard": "ignore"},
        {"detect_zeroes": "unmap", "discard": "unmap"},
    ]
    script: list[Script] = [[add(**more), node(), DELETE] for more in options]
    assert_alike(folder, Setting(), script)


# Names in blockdev-mirror


def test_nodes_that_a_mirror_names(folder: Path) -> None:
    """`replaces` must be what a pivot replaces here too, and `filter-node-name` a free name, though
    there is no filter."""
    wrong: list[dict[str, Any]] = [
        *[{"replaces": name} for name in ("nope", "tgt", "")],
        *[{"filter_node_name": name} for name in ("src", "tgt", "1x", "", "x" * 32)],
    ]
    right: list[dict[str, Any]] = [{"replaces": "src"}, {"filter_node_name": "filter"}]
    script: list[Script] = [
        [add()],
        [[mirror(**more), query()] for more in wrong],
        [[mirror(**more), ready(), FORCE, DISMISS] for more in right],
    ]
    assert_alike(folder, Setting(), script)


# drive-mirror


URI = "nbd+unix:///?socket=SOCKET"


@pytest.mark.parametrize("target", [URI, "nbd:unix:SOCKET"])
@pytest.mark.parametrize("format_", [None, "raw", "nbd"])
def test_the_form_of_a_target(folder: Path, target: str, format_: str | None) -> None:
    """A URI, and QEMU's older form, which libvirt and Proxmox send."""
    options = {"format": format_} if format_ else {}
    script: list[Script] = [
        [drive(target, **options), ready(), query(), FORCE, DISMISS, images(target=False)],
        [drive(target, **options), ready(), do("block-job-complete", device="j")],
        [status("concluded"), query(), images()],
    ]
    assert_alike(folder, Setting(), script, PROGRESS)


ADDRESS_TEXTS = Difference(
    "what an export that is not there, or no address, is called",
    "libnbd says which export, and nbdmirror what it read",
    substituted(
        r"Requested export not available|Failed to connect to X: No such file or directory"
        r"|error parsing address .*|NBD server address missing",
        "X",
    ),
)


def test_targets_that_cannot_be_reached(folder: Path) -> None:
    older = ("nbd:unix:/nope", "nbd:unix:SOCKET:exportname=nope", "nbd:127.0.0.1:1")
    more = ("nbd:127.0.0.1:1:exportname=x", "nbd:[::1]:1:exportname=x", "nbd:localhost", "nbd:")
    targets = [*older, *more, "nbd+unix:///nope?socket=SOCKET", "nbd://127.0.0.1:1/"]
    script: list[Script] = [[drive(target), query()] for target in targets]
    assert_alike(folder, Setting(), script, CONNECT_TEXTS, ADDRESS_TEXTS)


def test_names_of_a_drive_mirrors_node(folder: Path) -> None:
    wrong = [drive(URI, node_name=name) for name in ("src", "1x", "", "x" * 32)]
    wrong += [drive(URI, replaces="src"), drive(URI, replaces="nope", node_name="new")]
    script: list[Script] = [
        [*wrong, query()],
        [drive(URI, node_name="new"), ready(), node("new"), FORCE, node("new"), DISMISS],
        [drive(URI, node_name="new", replaces="src"), ready(), do("job-complete", id="j")],
        [status("concluded"), images(), DISMISS],
    ]
    assert_alike(folder, Setting(), script, PROGRESS)


def test_a_format_other_than_raw_is_refused(folder: Path) -> None:
    """QEMU would write it; nbdmirror must not write raw data over an image of that format."""
    difference = Difference(
        "formats",
        "nbdmirror has none: the target's server makes of the data what it was told to",
        without_step("drive-mirror"),
    )
    script: list[Script] = [
        [[drive(URI, format=name), query()] for name in ("qcow2", "bogus", "")],
        [images(equal=False)],
    ]
    _, ours = assert_alike(folder, Setting(), script, difference)
    assert ours.failure is None


# After a pivot


def nodes() -> Step:
    """The names of all nodes, newest first; those that QEMU generates are its filters."""

    def run(side: Side) -> None:
        with untold(side):
            found = [info["node-name"] for info in side.qmp.execute("query-named-block-nodes")]
        note(side, f"nodes: {[name for name in found if not name.startswith('#')]}")

    return Step("query nodes", run)


DELETE_SOURCE = do("blockdev-del", node_name="src")
PIVOT = [do("block-job-complete", device="j"), status("concluded"), DISMISS]


@pytest.mark.parametrize("source", ["plain", "faulty"])
def test_the_old_source_is_a_node_until_it_is_deleted(folder: Path, source: Any) -> None:
    """A management tool takes away what is not used any more, and does not want an error."""
    script: list[Script] = [
        [DELETE_SOURCE, start(), ready(), nodes(), DELETE_SOURCE, PIVOT],
        [nodes(), DELETE, add("src"), DELETE_SOURCE, nodes(), DELETE_SOURCE, images()],
    ]
    assert_alike(folder, Setting(source=source), script)


def test_back_to_the_old_source(folder: Path) -> None:
    """An NBD export on both sides, to which the disk is mirrored back under its old name."""
    back = mirror(device="tgt", target="src")
    script: list[Script] = [
        [start(), ready(), write(), PIVOT, write(4096), nodes()],
        [mirror(device="tgt"), back, ready(), nodes(), DELETE, write(65536, 1000), PIVOT, nodes()],
        [images(), DELETE_SOURCE, DELETE, nodes(), write(512, 512), query()],
    ]
    assert_alike(folder, Setting(source="faulty"), script, PROGRESS)


def exports() -> Step:
    """QEMU's export has an id of its own, and is told of the filter while a job runs."""

    def run(side: Side) -> None:
        with untold(side):
            found = side.qmp.execute("query-block-exports")
        for info in found:
            shown = {key: value for key, value in info.items() if key != "id"}
            note(side, f"export: {sorted(shown.items())}")

    return Step("query exports", run)


def test_a_pivot_is_seen_in_the_exports(folder: Path) -> None:
    script: list[Script] = [
        [exports(), start(), ready(), FORCE, DISMISS, exports()],
        [mirror(), ready(), PIVOT, exports(), images()],
    ]
    assert_alike(folder, Setting(), script)


# A raw node on an NBD node, as libvirt makes them


def delete(name: str) -> Step:
    return do("blockdev-del", node_name=name)


def test_a_raw_node_on_a_node(folder: Path) -> None:
    """A storage and a format layer, a mirror to the upper one, a pivot, and the layers taken away
    after the next pivot."""
    again = call("a second target", lambda side: side.start_target("second", MiB))
    upper = mirror(target="upper")
    script: list[Script] = [
        [add(), raw_node("upper", "tgt", read_only=False, discard="unmap"), nodes(), DELETE],
        [upper, ready(), delete("upper"), DELETE, FORCE, DISMISS, delete("upper"), nodes()],
        [raw_node("upper", "tgt"), upper, ready(), write(), PIVOT, node("upper"), exports()],
        [images(), write(4096, 512), delete("upper"), DELETE, DELETE_SOURCE, nodes()],
        [again, add("other", "second"), raw_node("more", "other")],
        [mirror(device="upper", target="more"), ready(), PIVOT, nodes()],
        [call("the copy is the disk", is_served("second"))],
        [delete("other"), DELETE, delete("upper"), DELETE, nodes()],
    ]
    assert_alike(folder, Setting(), script, PROGRESS)


def test_a_raw_node_with_what_it_is_on(folder: Path) -> None:
    script: list[Script] = [
        [raw_node("a", {}), nodes(), raw_node("b", {"node-name": "below"}), nodes()],
        [delete("below"), node("below"), delete("b"), nodes()],
        [raw_node("c", {"node-name": "below"}, read_only=True), node("c"), node("below")],
        [mirror(target="c"), delete("c"), delete("a"), nodes()],
        [raw_node("d", {"node-name": "d"}), raw_node("d", {"export": "nope"}), nodes()],
        [raw_node("d", "nope"), raw_node("d", 1), raw_node("d", {"driver": "bogus"}), nodes()],
        [
            add(read_only=True),
            raw_node("d", "tgt"),
            mirror(target="d"),
            nodes(),
            images(equal=False),
        ],
    ]
    assert_alike(folder, Setting(), script, NEVER_RAN, CONNECT_TEXTS, ADDRESS_TEXTS)


def test_two_names_of_one_node(folder: Path) -> None:
    """Nothing is mirrored to it twice at once."""
    script: list[Script] = [
        [add(), raw_node("a", "tgt"), raw_node("b", "tgt"), mirror(target="a"), ready()],
        [mirror(target="b", job_id="k"), mirror(target="tgt", job_id="k"), delete("b")],
        [FORCE, DISMISS, mirror(), ready(), PIVOT, images(), delete("a"), DELETE, nodes()],
    ]
    assert_alike(folder, Setting(), script, IN_USE)


IN_USE = Difference(
    "what a second job of the disk is told",
    "QEMU finds its filter on the disk, nbdmirror the job",
    substituted(r"Need a root block node|Node 'src' is busy: .*", "X"),
)
