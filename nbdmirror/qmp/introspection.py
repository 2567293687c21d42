"""query-qmp-schema: QEMU's introspection (qapi/introspect.json), made from the commands' entries
and the table of events.

Management tools query it for a server's abilities: whether a command takes an argument, whether an
enum has a value. As in QEMU the names of types are numbers, since they are not part of the
interface.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nbdmirror.qmp.command import Command
from nbdmirror.qmp.results import EVENTS
from nbdmirror.qmp.schema import (
    ANY,
    NOTHING,
    STR,
    Array,
    Enum,
    Plain,
    StringOr,
    Struct,
    Type,
    Unsigned,
    named,
    optional,
    struct,
)

Entry = dict[str, Any]

_META_TYPES = ("builtin", "enum", "array", "object", "alternate", "command", "event")
_JSON_TYPE_NAMES = ("string", "number", "int", "boolean", "null", "object", "array", "value")
_MEMBER = struct("SchemaInfoObjectMember", name=STR, type=STR, default=optional(ANY))

SCHEMA_INFO = Struct(
    "SchemaInfo",
    named(
        name=STR,
        meta_type=Enum("SchemaMetaType", _META_TYPES),
        features=optional(Array(STR)),
    ),
    tag="meta-type",
    branches={
        "builtin": struct("SchemaInfoBuiltin", json_type=Enum("JSONType", _JSON_TYPE_NAMES)),
        "enum": struct(
            "SchemaInfoEnum",
            members=Array(struct("SchemaInfoEnumMember", name=STR)),
            values=Array(STR),
        ),
        "array": struct("SchemaInfoArray", element_type=STR),
        "object": struct(
            "SchemaInfoObject",
            members=Array(_MEMBER),
            tag=optional(STR),
            variants=optional(Array(struct("SchemaInfoObjectVariant", case=STR, type=STR))),
        ),
        "alternate": struct(
            "SchemaInfoAlternate",
            members=Array(struct("SchemaInfoAlternateMember", type=STR)),
        ),
        "command": struct("SchemaInfoCommand", arg_type=STR, ret_type=STR),
        "event": struct("SchemaInfoEvent", arg_type=STR),
    },
)

NEGOTIATION = "qmp_capabilities"
"""A client's first command. It belongs to the conversation, so it has no entry."""

_CAPABILITIES = struct("Capabilities", enable=optional(Array(Enum("QMPCapability", ("oob",)))))

_JSON_TYPES = {
    "str": "string",
    "int": "int",
    "bool": "boolean",
    "number": "number",
    "any": "value",
}


def entries(commands: Mapping[str, Command]) -> list[Entry]:
    """An entry for each command, each event, and each type that they use."""
    types = _Types()
    found = [_command(NEGOTIATION, types.name(_CAPABILITIES), types.name(NOTHING))]
    for command in commands.values():
        entry = _command(command.name, types.name(command.arguments), types.name(command.returns))
        found.append({**entry, "features": ["deprecated"]} if command.is_deprecated else entry)
    found += [
        {"name": name, "meta-type": "event", "arg-type": types.name(data)}
        for name, data in EVENTS.items()
    ]
    return found + types.entries


def _command(name: str, arguments: str, returns: str) -> Entry:
    return {"name": name, "meta-type": "command", "arg-type": arguments, "ret-type": returns}


class _Types:
    """Gives types their names. `entries` describes the named types."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._names: dict[int, str] = {}

    def name(self, type_: Type) -> str:
        if isinstance(type_, Unsigned):
            return self._add("int", "builtin", {"json-type": "int"})
        if isinstance(type_, Plain):
            return self._add(type_.name, "builtin", {"json-type": _JSON_TYPES[type_.name]})
        if isinstance(type_, Array):
            element = self.name(type_.of)
            return self._add(f"[{element}]", "array", {"element-type": element})
        if id(type_) not in self._names:
            name = self._names[id(type_)] = str(len(self._names))
            self._describe(name, type_)
        return self._names[id(type_)]

    def _describe(self, name: str, type_: Type) -> None:
        if isinstance(type_, Enum):
            members = [{"name": value} for value in type_.values]
            self._add(name, "enum", {"members": members, "values": list(type_.values)})
        elif isinstance(type_, StringOr):
            members = [{"type": self.name(one)} for one in (STR, type_.other)]
            self._add(name, "alternate", {"members": members})
        else:
            assert isinstance(type_, Struct), "there is no other kind of type"
            self._add(name, "object", self._object(type_))

    def _object(self, type_: Struct) -> Entry:
        found: Entry = {"members": list(self._members(type_))}
        if type_.tag:
            found["tag"] = type_.tag
            found["variants"] = [
                {"case": case, "type": self.name(branch)} for case, branch in type_.branches.items()
            ]
        return found

    def _members(self, type_: Struct) -> Iterable[Entry]:
        for name, member in type_.members.items():
            entry = {"name": name, "type": self.name(member.type)}
            yield {**entry, "default": None} if member.optional else entry

    def _add(self, name: str, meta_type: str, more: Entry) -> str:
        if all(entry["name"] != name for entry in self.entries):
            self.entries.append({"name": name, "meta-type": meta_type, **more})
        return name
