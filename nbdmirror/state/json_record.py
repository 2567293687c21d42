"""Records as JSON objects: the keys of a file, and the values that each may have.

A record is a dataclass. Each field names its key, so a field can be renamed without a change of the
files:

    size: Annotated[int, Key("size", COUNT)]
    number: Annotated[int, Key("number", COUNT)] = 0

A field with a default is optional in files. Unknown keys are ignored, since a later version may
have added them. So a key may be added if older versions can ignore it. A change of a file's meaning
needs a new version of the format (sealed_files.VERSION). docs/state.md lists all keys."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, get_type_hints

from nbdmirror.state.sealed_files import UnknownFormat

_SHOWN_LENGTH_MAX = 60

RecordType = TypeVar("RecordType")


class Kind(Protocol):
    """The kind of a key's value. `where`: the path of the key, for the error."""

    expected: str

    def read(self, said: Any, where: str) -> Any:
        """Raises UnknownFormat."""

    def write(self, value: Any) -> Any: ...


class Plain(Kind):
    """A JSON value that is the field's value."""

    def __init__(self, expected: str, fits: Callable[[Any], bool]) -> None:
        self.expected = expected
        self._fits = fits

    def read(self, said: Any, where: str) -> Any:
        if not self._fits(said):
            raise _unexpected(where, self.expected, said)
        return said

    def write(self, value: Any) -> Any:
        return value


def _is_integer(said: Any, lowest: float = -math.inf) -> bool:
    return type(said) is int and said >= lowest


def _is_number(said: Any) -> bool:
    return type(said) in (int, float) and math.isfinite(said) and said >= 0


TEXT = Plain("a string", lambda said: isinstance(said, str))
ID = Plain(
    "32 hexadecimal digits",
    lambda said: isinstance(said, str) and re.fullmatch("[0-9a-f]{32}", said) is not None,
)
FLAG = Plain("true or false", lambda said: isinstance(said, bool))
COUNT = Plain("an integer of 0 or more", lambda said: _is_integer(said, 0))
INTEGER = Plain("an integer", _is_integer)
POSITIVE = Plain("an integer of 1 or more", lambda said: _is_integer(said, 1))
POWER_OF_2 = Plain("a power of two", lambda said: _is_integer(said, 1) and not said & (said - 1))
NUMBER = Plain("a number of 0 or more", _is_number)


def one_of(*words: str) -> Plain:
    """The kind of a string that is one of `words`."""
    return Plain(f"one of {', '.join(words)}", lambda said: said in words)


class OrNull(Kind):
    """A value of `kind`, or null."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.expected = f"{kind.expected}, or null"

    def read(self, said: Any, where: str) -> Any:
        return None if said is None else self.kind.read(said, where)

    def write(self, value: Any) -> Any:
        return None if value is None else self.kind.write(value)


class Object(Kind):
    """Another record."""

    def __init__(self, type_: type) -> None:
        self.type = type_
        self.expected = "an object"

    def read(self, said: Any, where: str) -> Any:
        return read(self.type, said, where)

    def write(self, value: Any) -> Any:
        return write(value)


class ListOf(Kind):
    """A tuple of values of one kind."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.expected = f"a list of {kind.expected.removeprefix('an ').removeprefix('a ')}s"

    def read(self, said: Any, where: str) -> Any:
        if not isinstance(said, list):
            raise _unexpected(where, self.expected, said)
        return tuple(self.kind.read(one, f"{where}[{at}]") for at, one in enumerate(said))

    def write(self, value: Any) -> Any:
        return [self.kind.write(one) for one in value]


class MapOf(Kind):
    """Values of one kind, by arbitrary names."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.expected = f"an object, with {kind.expected} for each name"

    def read(self, said: Any, where: str) -> Any:
        if not isinstance(said, dict):
            raise _unexpected(where, self.expected, said)
        return {name: self.kind.read(one, f"{where}.{name}") for name, one in said.items()}

    def write(self, value: Any) -> Any:
        return {name: self.kind.write(one) for name, one in value.items()}


@dataclass(frozen=True, slots=True)
class Key:
    """A key in a file, and the kind of its value."""

    name: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Member:
    """A field of a record, and its key."""

    field: str
    key: Key
    is_optional: bool


@functools.cache
def members(type_: Any) -> tuple[Member, ...]:
    """The members of a record's class."""
    hints = get_type_hints(type_, include_extras=True)
    return tuple(
        Member(
            field=field.name,
            key=hints[field.name].__metadata__[0],
            is_optional=field.default is not dataclasses.MISSING,
        )
        for field in dataclasses.fields(type_)
    )


def write(record: Any) -> dict[str, Any]:
    """The record as a JSON object, with the keys of its fields."""
    type_: Any = type(record)
    return {one.key.name: one.key.kind.write(getattr(record, one.field)) for one in members(type_)}


def read(type_: Callable[..., RecordType], said: Any, where: str = "") -> RecordType:
    """The record from its JSON value. `where`: the path of the record in its file. Raises
    UnknownFormat, which names the first wrong field."""
    if not isinstance(said, dict):
        raise _unexpected(where or "the record", "an object", said)
    values = {}
    for one in members(type_):
        name, kind = one.key.name, one.key.kind
        path = f"{where}.{name}" if where else name
        if name in said:
            values[one.field] = kind.read(said[name], path)
        elif not one.is_optional:
            raise UnknownFormat(f"{path}: expected {kind.expected}, but it is missing")
    return type_(**values)


def dump(record: Any, *, indent: int | None = 1) -> bytes:
    """The record as JSON text; on one line if `indent` is None."""
    return json.dumps(write(record), indent=indent).encode()


def load(type_: Callable[..., RecordType], body: bytes) -> RecordType:
    """The record from JSON text. Raises UnknownFormat."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnknownFormat(f"is not JSON: {error}") from error
    return read(type_, said)


def _unexpected(where: str, expected: str, said: Any) -> UnknownFormat:
    found = json.dumps(said)
    if len(found) > _SHOWN_LENGTH_MAX:
        found = f"{found[:_SHOWN_LENGTH_MAX]}..."
    return UnknownFormat(f"{where}: expected {expected}, found {found}")
