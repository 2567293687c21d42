"""What the tests of hostile servers have in common."""

from __future__ import annotations

import struct
from typing import Any

from support.hostile import (
    ACK,
    FLAGS,
    FLUSH,
    GO,
    MAGIC,
    REP_INFO,
    REP_META,
    SET_META,
    WRITE,
    ZERO,
    Hostile,
    OptionTrick,
    Talk,
    option_reply,
)
from support.images import MiB
from support.qmpclient import Qmp, Refused

SIZE = 2 * MiB
OPEN_S = 2
"""open-timeout: a handshake that does not end is given up then."""

SLACK_S = 6.0
FORCE_S_MAX = 3.0
"""Of a forced cancel, which takes 0.3 s: this machine may be busy."""

NO_WAY_OUT = r"connection broken|not flushed|lost: |connection lost|does not answer|write error"


def add(qmp: Qmp, target: Hostile, **options: object) -> None:
    address = {"type": "unix", "path": str(target.socket)}
    qmp.execute(
        "blockdev-add", driver="nbd", node_name="evil", server=address, open_timeout=OPEN_S,
        **options,
    )  # fmt: skip


def mirror(qmp: Qmp, **options: Any) -> None:
    qmp.start_mirror("evil", **{"auto_dismiss": False, **options})


def refusal(qmp: Qmp, command: str, **arguments: object) -> str:
    """The error's text, or "" if there is none."""
    try:
        qmp.execute(command, **arguments)
    except Refused as error:
        return str(error)
    return ""


def is_one_line(text: str) -> bool:
    return bool(text) and text.isprintable() and len(text) < 1000


KINDS = {"write": WRITE, "zero": ZERO, "flush": FLUSH}


def replies(*answers: bytes) -> OptionTrick:
    return lambda talk, option: b"".join(answers)


def flood(data: bytes) -> OptionTrick:
    def trick(talk: Talk, option: int) -> bytes:
        talk.flood(data)
        raise AssertionError

    return trick


def dripping(talk: Talk, option: int) -> bytes:
    talk.drip(option_reply(option, ACK) * 100)
    raise AssertionError


def silent(talk: Talk, option: int) -> bytes:
    talk.silence()
    raise AssertionError


INFO_REPLY = option_reply(GO, REP_INFO, struct.pack(">HQH", 0, SIZE, FLAGS))
META_REPLY = option_reply(SET_META, REP_META, struct.pack(">I", 1) + b"base:allocation")
EVIL_TEXT = b"evil \x1b[31m\r\n\n" + b"x" * 4000

HANDSHAKES: dict[str, dict[str, object]] = {
    "wrong magic": {"greeting": b"X" * 18},
    "wrong option magic": {"greeting": struct.pack(">QQH", MAGIC, 1, 3)},
    "megabytes": {"greeting": bytes(18) + b"Z" * (16 << 20)},
    "endless replies": {"on_option": {GO: flood(INFO_REPLY)}},
    "endless contexts": {"on_option": {SET_META: flood(META_REPLY)}},
    "a byte now and then": {"on_option": {GO: dripping}},
    "silence": {"on_option": {GO: silent}},
    "4 GiB are to follow": {
        "on_option": {GO: replies(option_reply(GO, REP_INFO, length=2**32 - 1))}
    },
    "to another option": {"on_option": {GO: replies(option_reply(99, ACK))}},
    "of an unknown type": {"on_option": {GO: replies(option_reply(GO, 77))}},
    "an error with a text": {"on_option": {GO: replies(option_reply(GO, 0x80000006, EVIL_TEXT))}},
    "an unknown error": {"on_option": {GO: replies(option_reply(GO, 0x80000FFF, EVIL_TEXT))}},
    "nothing is told": {"on_option": {GO: replies(option_reply(GO, ACK))}},
    "no flags": {"flags": 0},
    "2**63 bytes": {"size": 1 << 63},
    "2**63 + 1 bytes": {"size": (1 << 63) + 1},
    "-1 bytes": {"size": (1 << 64) - 1},
}
