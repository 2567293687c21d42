"""What a target is when its mirror has ended in order, in words, for the server and its clients: a
copy of the disk, or less, if the mirror did not copy the whole disk."""

from __future__ import annotations


def is_partial(sync: str) -> bool:
    """Whether a mirror with this sync mode leaves some of the target's old content."""
    return sync != "full"


def target_text(sync: str) -> str:
    """What the target is; the text goes after its name."""
    if not is_partial(sync):
        return "is a consistent copy"
    text = f"has what sync {sync} copies, and elsewhere its old content"
    if sync in ("bitmap", "incremental"):
        text += ": a consistent copy if that was one when the bitmap began"
    return text
