"""Arguments of QMP commands: named, typed, and checked with the texts of QEMU's checks.

The part of QAPI that the commands here need. A checked value is a plain dict; an optional member
that was not given is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from nbdmirror.errors import CommandError


class Type(Protocol):
    """The type of an argument."""

    @property
    def name(self) -> str:
        """The type's name in the documentation."""

    def check(self, value: object, where: str) -> None:
        """Raise CommandError unless `value`, the member `where`, has this type."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A JSON type."""

    name: str
    python: type
    expected: str

    def check(self, value: object, where: str) -> None:
        # bool is an int to Python, never to QMP. A whole number is a number, too.
        kinds = (int, float) if self.python is float else (self.python,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and int in kinds):
            raise _wrong_type(where, self.expected)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise _wrong_type(where, self.expected)


@dataclass(frozen=True, slots=True)
class Unsigned:
    """An integer of `bits` bits that is not negative. QEMU's error for other values names
    uint64."""

    bits: int

    @property
    def name(self) -> str:
        return f"uint{self.bits}"

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise CommandError(f"Parameter '{where}' expects uint64")
        if not 0 <= value < 2**self.bits:
            suffix = "_t" if self.bits == 32 else ""
            raise CommandError(f"Parameter '{where}' expects uint{self.bits}{suffix}")


@dataclass(frozen=True, slots=True)
class Enum:
    """One of several strings."""

    name: str
    values: tuple[str, ...]

    def check(self, value: object, where: str) -> None:
        STR.check(value, where)
        if value not in self.values:
            raise CommandError(
                f"Parameter '{where.rpartition('.')[2]}' does not accept value '{value}'"
            )


@dataclass(frozen=True, slots=True)
class Array:
    """A list of values of one type."""

    of: Type

    @property
    def name(self) -> str:
        return f"[{self.of.name}]"

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, list):
            raise _wrong_type(where, "array")
        for number, item in enumerate(value):
            self.of.check(item, f"{where}[{number}]")


@dataclass(frozen=True, slots=True)
class StringOr:
    """QAPI's alternate of a string and another type; `called` is its name in errors."""

    other: Type
    called: str

    @property
    def name(self) -> str:
        return f"str or {self.other.name}"

    def check(self, value: object, where: str) -> None:
        if not isinstance(value, (str, dict)):
            raise _wrong_type(where, self.called)
        if not isinstance(value, str):
            self.other.check(value, where)


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a struct."""

    type: Type
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Struct:
    """Members by name. With `tag`, a union: the members of `branches[value of tag]` are added."""

    name: str
    members: Mapping[str, Member]
    tag: str = ""
    branches: Mapping[str, Struct] = field(default_factory=dict)

    def check(self, value: object, where: str = "") -> None:
        if not isinstance(value, dict):
            raise _wrong_type(where, "object")
        prefix = f"{where}." if where else ""
        _check_members(value, self.members, prefix)
        known = set(self.members)
        if self.tag:
            branch = self.branches[value[self.tag]]
            _check_members(value, branch.members, prefix)
            known |= set(branch.members)
        for name in value:
            if name not in known:
                raise CommandError(f"Parameter '{prefix}{name}' is unexpected")


def _check_members(value: dict[str, Any], members: Mapping[str, Member], prefix: str) -> None:
    for name, member in members.items():
        if name in value:
            member.type.check(value[name], prefix + name)
        elif not member.optional:
            raise CommandError(f"Parameter '{prefix}{name}' is missing")


def _wrong_type(where: str, expected: str) -> CommandError:
    return CommandError(f"Invalid parameter type for '{where or 'null'}', expected: {expected}")


STR = Plain("str", str, "string")
INT = Plain("int", int, "integer")
BOOL = Plain("bool", bool, "boolean")
UINT32 = Unsigned(32)
NUMBER = Plain("number", float, "number")
ANY = Plain("any", object, "value")


def struct(name: str, /, **members: Type | Member) -> Struct:
    """A Struct. Members are written with `_` for `-`; optional ones are wrapped in `optional`."""
    return Struct(name, named(**members))


def named(**members: Type | Member) -> dict[str, Member]:
    return {
        name.replace("_", "-"): member if isinstance(member, Member) else Member(member)
        for name, member in members.items()
    }


def optional(type_: Type) -> Member:
    return Member(type_, optional=True)


NOTHING = Struct("Nothing", {})
