"""What must hold of QMP's input parser for any bytes at all; for Hypothesis and for atheris."""

from __future__ import annotations

import itertools
import json
import random
import sys
from typing import Any

from nbdmirror.qmp.json_stream import (
    DEPTH_MAX,
    VALUE_BYTES_MAX,
    VALUE_TOKENS_MAX,
    JsonStream,
    ParseError,
)

HELD_BYTES_MAX = 100 * VALUE_TOKENS_MAX + 3 * VALUE_BYTES_MAX
"""Of an unfinished value: tokens of some 100 bytes, and a string with its copies."""


def results(chunks: list[bytes]) -> list[str]:
    """The values and errors that come of these packets, to be compared; up to a fatal one."""
    stream, found = JsonStream(), []
    for chunk in chunks:
        for value in stream.feed(chunk):
            if isinstance(value, ParseError):
                found.append(f"{type(value).__name__}: {value}")
                if value.fatal:
                    return [*found, "fatal"]
            else:
                found.append(json.dumps(value, allow_nan=False))
        assert held_bytes(stream) <= HELD_BYTES_MAX
    return found


def held_bytes(stream: JsonStream) -> int:
    """Memory that the stream keeps, from outside: whatever it is made of."""
    total, left = 0, list(vars(stream).values())
    while left:
        thing = left.pop()
        total += sys.getsizeof(thing)
        if isinstance(thing, list | tuple | set):
            left += thing
        elif isinstance(thing, dict):
            left += [*thing, *thing.values()]
    return total


def pieces(data: bytes, seed: int) -> list[bytes]:
    noise = random.Random(seed)
    bounds = sorted(
        {0, len(data), *(noise.randint(0, len(data)) for _ in range(noise.randint(0, 9)))}
    )
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


def check(data: bytes) -> None:
    """Raises AssertionError, or what the parser raised, if something does not hold."""
    data += b"\n"  # ends a word
    whole = results([data])
    assert results(pieces(data, len(data) + sum(data[:64]))) == whole
    if len(data) < 2000:
        assert results([bytes((byte,)) for byte in data]) == whole
    judgement = _json(data)
    if judgement is not None:
        assert whole == [judgement], (whole, judgement)
    elif len(whole) == 1 and b"'" not in data and results([data, b"[7]\n"]) == [*whole, "[7]"]:
        # One good value, after which nothing is unfinished.
        assert whole[0].startswith("ParseError") or _is_ours_alone(data), (
            f"the json module does not read it: {whole}"
        )


def _json(data: bytes) -> str | None:
    """What the json module makes of it; None if it, or QMP, does not take it."""
    try:
        value = json.loads(data.decode(), parse_constant=_refuse, object_pairs_hook=_distinct)
        text = json.dumps(value, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError):
        return None
    return text if isinstance(value, dict | list) and _is_within(value) else None


def _refuse(word: str) -> Any:
    raise ValueError(word)  # NaN, Infinity


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _is_within(value: Any, depth: int = 0) -> bool:
    """Whether QMP's numbers, strings and limits take it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return -(1 << 63) <= value < 1 << 64
    if isinstance(value, str):
        return not any("\ud800" <= char < "\ue000" for char in value)
    if depth > DEPTH_MAX - 2:
        return False
    if isinstance(value, dict):
        return all(_is_within(x, depth + 1) for pair in value.items() for x in pair)
    return not isinstance(value, list) or all(_is_within(x, depth + 1) for x in value)


def _is_ours_alone(data: bytes) -> bool:
    """Whole numbers beyond 64 bits, which are doubles in QMP."""
    try:
        return not _is_within(json.loads(data.decode()))
    except ValueError:
        return False
