"""The arguments of blockdev-mirror and drive-mirror that belong to copy mode points."""

from __future__ import annotations

from dataclasses import dataclass

from nbdmirror.disk.disk import Disk
from nbdmirror.errors import CommandError
from nbdmirror.mirror.options import CopyMode
from nbdmirror.mirror.point_source import STORE_BYTES_DEFAULT
from nbdmirror.qmp.schema import BOOL, INT, NUMBER, STR, Enum, Member, named, optional
from nbdmirror.server.nodes import Nodes
from nbdmirror.server.points_checks import PointsOptions

INTERVAL_S_DEFAULT, INTERVAL_S_MIN, INTERVAL_S_MAX = 1.0, 0.1, 86400.0
"""Of points."""

KEEP_POINTS_MAX = 86_400
"""Most points that a journal may be asked to keep: a day of one each second. Their headers are in
memory, 50 MB, and a reader of the journal reads all of them."""

STORE_BYTES_MIN, STORE_BYTES_MAX = 1 << 20, 1 << 40
"""Of memory and of the spill file, which may also be absent (0)."""

ON_CBW_ERROR = Enum("OnCbwError", ("break-guest-write", "break-snapshot"))
"""As QEMU's copy-before-write has it."""

ON_JOURNAL_FULL = Enum("OnJournalFull", ("stop", "in-place"))

POINTS_MEMBERS: dict[str, Member] = named(
    x_nbdmirror_journal=optional(STR),
    x_nbdmirror_auto_point=optional(BOOL),
    x_nbdmirror_interval=optional(NUMBER),
    x_nbdmirror_keep=optional(NUMBER),
    x_nbdmirror_rpo=optional(NUMBER),
    x_nbdmirror_store_bytes=optional(INT),
    x_nbdmirror_spill_bytes=optional(INT),
    x_nbdmirror_on_journal_full=optional(ON_JOURNAL_FULL),
    on_cbw_error=optional(ON_CBW_ERROR),
)


PROMISES = (
    "x-nbdmirror-max-pause",
    "x-nbdmirror-may",
    "x-nbdmirror-deadline",
    "x-nbdmirror-on-deadline",
)
"""About the end of a job."""

MEMBERS_OF_CHANGE: dict[str, Member] = {
    name: member for name, member in POINTS_MEMBERS.items() if name != "x-nbdmirror-auto-point"
}
"""Those of block-job-change: points that are snapshots need a job of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointsArguments:
    """None: not given."""

    copy_mode: str = "background"
    sync: str
    x_nbdmirror_journal: str | None = None
    x_nbdmirror_auto_point: bool | None = None
    x_nbdmirror_interval: float | None = None
    x_nbdmirror_keep: float | None = None
    x_nbdmirror_rpo: float | None = None
    x_nbdmirror_store_bytes: int | None = None
    x_nbdmirror_spill_bytes: int | None = None
    x_nbdmirror_on_journal_full: str | None = None
    on_cbw_error: str | None = None
    x_nbdmirror_max_pause: int = 0
    x_nbdmirror_may: object = ()
    x_nbdmirror_deadline: float = 0
    x_nbdmirror_on_deadline: str | None = None


def attribute(name: str) -> str:
    """The name of an argument in Python."""
    return name.replace("-", "_")


def refuse_promises(given: object) -> None:
    """Raise CommandError if the arguments `given` promise an end, which points do not."""
    for key in PROMISES:
        if getattr(given, attribute(key)):
            raise CommandError(f"Copy mode 'points' accepts no '{key}'")


def points_options(nodes: Nodes, disk: Disk, given: PointsArguments) -> PointsOptions | None:
    """What copy mode points is asked for; None: it is another mode. Raises CommandError."""
    name = given.x_nbdmirror_journal
    if CopyMode(given.copy_mode) is not CopyMode.POINTS:
        for key in POINTS_MEMBERS:
            if getattr(given, attribute(key)) is not None:
                raise CommandError(f"Parameter '{key}' needs copy-mode 'points'")
        return None
    _check_far_side(given)
    if given.sync != "full":
        raise CommandError("Copy mode 'points' needs sync 'full'")
    refuse_promises(given)
    interval_s, keep_s, rpo_s = _times(given)
    store_bytes = given.x_nbdmirror_store_bytes
    if store_bytes is None:
        store_bytes = STORE_BYTES_DEFAULT
    _check_size("x-nbdmirror-store-bytes", store_bytes)
    spill_bytes = given.x_nbdmirror_spill_bytes or 0
    if spill_bytes:
        _check_size("x-nbdmirror-spill-bytes", spill_bytes)
    node = nodes.find_target(disk, name) if name is not None else None
    if node is None and name is not None:
        raise CommandError(f"Journal: Node '{name}' is in use")
    return PointsOptions(
        node,
        interval_s,
        keep_s,
        rpo_s,
        store_bytes=store_bytes,
        spill_bytes=spill_bytes,
        in_place=given.x_nbdmirror_on_journal_full == "in-place",
        breaks_guest_writes=given.on_cbw_error == "break-guest-write",
    )


def _check_far_side(given: PointsArguments) -> None:
    """Points are in a journal, or are snapshots. Raises CommandError."""
    if given.x_nbdmirror_journal is not None:
        if given.x_nbdmirror_auto_point is False:
            text = "accepts no 'x-nbdmirror-journal' if it is false: give one of the two"
            raise CommandError(f"Parameter 'x-nbdmirror-auto-point' {text}")
        return
    if given.x_nbdmirror_auto_point is not False:
        text = "needs 'x-nbdmirror-journal', or, for a target whose snapshots are the points"
        raise CommandError(f"Copy mode 'points' {text}, 'x-nbdmirror-auto-point' false")
    for key in ("x-nbdmirror-keep", "x-nbdmirror-on-journal-full"):
        if getattr(given, attribute(key)) is not None:
            raise CommandError(f"Parameter '{key}' needs 'x-nbdmirror-journal'")


def _times(given: PointsArguments) -> tuple[float, float, float]:
    """The interval of points, for how long they are kept, and the promised lag; 0: none. Raises
    CommandError."""
    interval_s = given.x_nbdmirror_interval
    if interval_s is None:
        interval_s = INTERVAL_S_DEFAULT
    if not INTERVAL_S_MIN <= interval_s <= INTERVAL_S_MAX:
        bounds = f"{INTERVAL_S_MIN:g} to {INTERVAL_S_MAX:g}"
        raise CommandError(f"Parameter 'x-nbdmirror-interval' expects {bounds} seconds")
    keep_s, rpo_s = given.x_nbdmirror_keep or 0, given.x_nbdmirror_rpo
    if not 0 <= keep_s <= interval_s * KEEP_POINTS_MAX:
        bounds = f"0 to {interval_s * KEEP_POINTS_MAX:g} seconds: {KEEP_POINTS_MAX} intervals"
        raise CommandError(f"Parameter 'x-nbdmirror-keep' expects {bounds}")
    if rpo_s is not None and not interval_s < rpo_s <= INTERVAL_S_MAX:
        bounds = f"more than the interval of {interval_s:g} seconds, and at most {INTERVAL_S_MAX:g}"
        raise CommandError(f"Parameter 'x-nbdmirror-rpo' expects {bounds}")
    return float(interval_s), float(keep_s), float(rpo_s or 0)


def _check_size(parameter: str, size: int) -> None:
    if not STORE_BYTES_MIN <= size <= STORE_BYTES_MAX:
        bounds = f"{STORE_BYTES_MIN} to {STORE_BYTES_MAX}"
        raise CommandError(f"Parameter '{parameter}' expects {bounds} bytes")
