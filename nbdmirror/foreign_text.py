"""Text that somebody else decides: a client, another server, a file. Wherever it is shown or
logged, it is a part of one line, and does nothing to a terminal."""

from __future__ import annotations

QUOTED_LENGTH_MAX = 100


def visible(text: str) -> str:
    """`text` in one line: control characters, line ends too, are shown as escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def quoted(text: str) -> str:
    """`text` between apostrophes, cut off if it is long. It has no apostrophe itself: a quiet log
    must see where it ends (quiet_log.py)."""
    shown = text[:QUOTED_LENGTH_MAX] + "..." * (len(text) > QUOTED_LENGTH_MAX)
    return "'" + visible(shown).replace("'", r"\x27") + "'"
