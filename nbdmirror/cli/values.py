"""The values of options: sizes, rates, times, numbers. Each is what the user means, or refused."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from nbdmirror.cli.streams import say
from nbdmirror.limits import PORT_MAX, whole_number
from nbdmirror.paths import absolute_path

SLOW_BYTES_PER_S = 64 << 10


def parse_size(text: str) -> int:
    """A size in bytes: a number with an optional K, M, G or T, powers of 1024. KB and the like are
    refused, since some people read them as powers of 1000."""
    match = re.fullmatch(
        r"([0-9]+)(?:\.([0-9]+))?([KMGT]?)(?:(?<=[KMGTkmgt])iB)?", text, re.IGNORECASE
    )
    if not match:
        text = f"{text!r} is not a size (examples: 65536, 64K, 1.5G, 10MiB, 2T; powers of 1024)"
        raise argparse.ArgumentTypeError(text)
    whole, part, unit = match.groups(default="")
    scale: int = 1024 ** " KMGT".index(unit.upper() or " ")
    size, rest = divmod(int(whole + part) * scale, int("1" + "0" * len(part)))
    if rest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of bytes")
    if size >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 8 EiB")
    return size


def rate(text: str) -> int:
    """Bytes per second; a rate that is implausibly low gets a warning."""
    found = parse_size(text)
    if 0 < found < SLOW_BYTES_PER_S:
        word = f"{text} means {found} bytes per second; 1M is one MiB per second"
        say(f"nbdmirror: warning: {word}")
    return found


def seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{0,9})?", text):
        text = f"{text!r} is not a number of seconds (0 or more; examples: 30, 0.5)"
        raise argparse.ArgumentTypeError(text)
    return float(text)


def whole(least: int, most: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        if (number := whole_number(text, least, most)) is None:
            text = f"{text!r} is not a whole number from {least} to {most}"
            raise argparse.ArgumentTypeError(text)
        return number

    return parse


def migration_uri(text: str) -> str:
    kind, colon, where = text.partition(":")
    if not (re.fullmatch("[a-z]+", kind) and colon and where):
        raise argparse.ArgumentTypeError(f"{text!r} is not an address (example: tcp:HOST:4444)")
    address = where.partition(",")[0]
    port = address.rpartition(":")[2]
    if kind == "tcp" and whole_number(port, 1, PORT_MAX) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: the port is not a number from 1 to {PORT_MAX}")
    return f"{kind}:{absolute_path(where)}" if kind in ("unix", "file") else text


def duration(text: str) -> float:
    """Seconds: a number with an optional unit."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d|)", text)
    if not match:
        text = f"{text!r} is not a time (examples: 0.5, 500ms, 1s, 5m, 2h, 7d)"
        raise argparse.ArgumentTypeError(text)
    number, unit = match.groups()
    return float(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}[unit]
