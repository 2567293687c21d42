"""A QMP command's arguments in one line, as docs/qmp.md and the manual page show them."""

from __future__ import annotations

from typing import Any

from nbdmirror.qmp.commands import COMMANDS
from nbdmirror.qmp.schema import Array, Enum, Member, StringOr, Struct

BRANCHES_MAX = 2
"""A union of more is not written out: its section lists them."""


def signature(command: str) -> str:
    """As a line of arguments: those in brackets are optional."""
    return members_of(COMMANDS[command].arguments)


def members_of(struct: Struct) -> str:
    parts = [_member(name, member) for name, member in struct.members.items()]
    if len(struct.branches) > BRANCHES_MAX:
        parts.append("...")
    elif struct.branches:
        parts.append(" | ".join(map(members_of, struct.branches.values())))
    return ", ".join(parts)


def _member(name: str, member: Member) -> str:
    text = f"{name}: {_type(member.type)}"
    return f"[{text}]" if member.optional else text


def _type(type_: Any) -> str:
    if isinstance(type_, Enum):
        return "|".join(type_.values) if len(type_.values) < 8 else "string"
    if isinstance(type_, Array):
        return f"[{_type(type_.of)}, ...]"
    if isinstance(type_, StringOr):
        return f"string or {_type(type_.other)}"
    if isinstance(type_, Struct):
        return "{" + members_of(type_) + "}"
    return "string" if type_.name == "str" else str(type_.name)
