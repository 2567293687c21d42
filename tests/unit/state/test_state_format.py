"""The records of a state directory: what is written is read again, what is not as it should be is
refused by its name. (docs/state.md lists what there is: test_docs.py.)"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Iterable
from dataclasses import fields, replace
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.staterecords import FILES, JOB, MIRROR, PLACES, SAMPLES, Steps, path_of, records

from nbdmirror.mirror.options import CopyMode, MirrorOptions, Policy
from nbdmirror.nbdclient.handshake import ExportInfo
from nbdmirror.server.mirror_record import options_of
from nbdmirror.state.bitmap_snapshot import BitmapSnapshot
from nbdmirror.state.disk_record import ExportRecord, JobRecord, MirrorRecord
from nbdmirror.state.json_record import (
    ID,
    TEXT,
    Kind,
    ListOf,
    MapOf,
    Member,
    dump,
    load,
    members,
)
from nbdmirror.state.sealed_files import UnknownFormat

files = pytest.mark.parametrize("file", FILES)

every_key = pytest.mark.parametrize(
    ("file", "steps", "member"),
    PLACES,
    ids=[f"{file.removeprefix('NAME.')}:{path_of(steps)}" for file, steps, _ in PLACES],
)


@functools.cache
def text_of(file: str) -> bytes:
    return dump(SAMPLES[file])


def content_of(file: str) -> Any:
    return json.loads(text_of(file))


def owner(said: Any, steps: Steps) -> Any:
    """The object that has the key."""
    for step in steps[:-1]:
        said = said[step]
    return said


def reread(file: str, said: Any) -> Any:
    return load(FILES[file], json.dumps(said).encode())


@files
@given(st.data())
def test_what_is_written_is_read_again(file: str, data: st.DataObject) -> None:
    record = data.draw(records(FILES[file]))
    assert load(FILES[file], dump(record)) == record


@given(st.dictionaries(st.text(), st.binary(), max_size=3), st.integers(0, 2**40))
def test_bitmaps_that_are_written_are_read_again(bits: dict[str, bytes], mtime_ns: int) -> None:
    saved = BitmapSnapshot("0" * 32, 1.5, bits, mtime_ns)
    content = saved.to_bytes()
    assert BitmapSnapshot.from_bytes(content, {key: len(one) for key, one in bits.items()}) == saved
    assert BitmapSnapshot.from_bytes(content, {}) == BitmapSnapshot("0" * 32, 1.5, {}, mtime_ns), (
        "none is wanted"
    )


@every_key
def test_a_key_that_is_missing(file: str, steps: Steps, member: Member) -> None:
    """Either it has a default, or the error names it."""
    said = content_of(file)
    del owner(said, steps)[steps[-1]]
    if member.is_optional:
        defaulted = json.loads(dump(reread(file, said)))
        del owner(defaulted, steps)[steps[-1]]
        assert defaulted == said, "nothing else has changed"
        return
    with pytest.raises(UnknownFormat) as caught:
        reread(file, said)
    expected = member.key.kind.expected
    assert str(caught.value) == f"{path_of(steps)}: expected {expected}, but it is missing"


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([0, 1, -1, 3, 2**64, 1.5, -0.5, "", "12", "full", "0" * 32]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=3,
)


def may_stand(kind: Kind, value: Any) -> bool:
    """Whether a JSON value's type suits a key, said once more, without the code's help."""
    expected = kind.expected.removesuffix(", or null")
    if value is None:
        return expected != kind.expected
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if expected == "true or false":
        return isinstance(value, bool)
    if expected.startswith("an integer"):
        lowest = {"": -math.inf, " of 0 or more": 0, " of 1 or more": 1}
        return is_integer and lowest[expected.removeprefix("an integer")] <= value
    if expected == "a power of two":
        return is_integer and bin(value).strip("0b") == "1"
    if expected == "a number of 0 or more":
        return (is_integer or isinstance(value, float)) and 0 <= value < float("inf")
    if expected.startswith("one of "):
        return value in expected.removeprefix("one of ").split(", ")
    if expected == ID.expected:
        return isinstance(value, str) and len(value) == 32 and set(value) <= set("0123456789abcdef")
    if expected == TEXT.expected:
        return isinstance(value, str)
    if isinstance(kind, MapOf):
        return isinstance(value, dict) and all(may_stand(kind.kind, one) for one in value.values())
    # A list of records is right if it is empty: what is in the others lacks keys.
    return isinstance(kind, ListOf) and (
        isinstance(value, list) and all(may_stand(kind.kind, one) for one in value)
    )


@every_key
@settings(max_examples=25)
@given(value=JSON_VALUES)
@example(value=[""])
def test_a_value_that_is_not_what_it_should_be(
    file: str, steps: Steps, member: Member, value: Any
) -> None:
    """The error names the field, and says what is expected of it; or of what is in it."""
    said = content_of(file)
    owner(said, steps)[steps[-1]] = value
    kind = member.key.kind
    if may_stand(kind, value):
        assert json.loads(dump(reread(file, said))) == said
        return
    with pytest.raises(UnknownFormat) as caught:
        reread(file, said)
    error = str(caught.value)
    expected = kind.expected.removesuffix(", or null")
    is_inside = isinstance(value, dict | list)
    assert error.startswith(f"{path_of(steps)}: expected {expected}") or (
        is_inside and error.startswith(path_of(steps)) and ": expected " in error
    )


@pytest.mark.parametrize(
    ("file", "steps", "value", "error"),
    [
        ("NAME.json", ("identity", "size"), "12",
         'identity.size: expected an integer of 0 or more, found "12"'),
        ("NAME.json", ("identity", "size"), -1,
         "identity.size: expected an integer of 0 or more, found -1"),
        ("NAME.json", ("identity", "inode"), True,
         "identity.inode: expected an integer of 0 or more, found true"),
        ("NAME.json", ("identity", "size"), 4096.0, "identity.size: expected an integer of 0 or"),
        ("NAME.json", ("bitmaps",), ["b"], 'bitmaps[0]: expected an object, found "b"'),
        ("NAME.json", ("bitmaps",), {}, "bitmaps: expected a list of objects, found {}"),
        ("NAME.json", ("bitmaps", 0, "granularity"), 3, "bitmaps[0].granularity: expected a power"),
        ("NAME.json", ("mirror", "job", "copy_mode"), "fast",
         "mirror.job.copy_mode: expected one of background, write-blocking, points, found"),
        ("NAME.json", ("mirror", "job", "unmap"), 1,
         "mirror.job.unmap: expected true or false, found 1"),
        ("NAME.json", ("mirror", "node", "reconnect_delay_s"), float("nan"),
         "mirror.node.reconnect_delay_s: expected a number of 0 or more, found NaN"),
        ("NAME.json", ("disk_id",), "x" * 100, "disk_id: expected 32 hexadecimal digits, found"),
        ("NAME.bitmaps", ("bitmaps",), {"b": -1},
         "bitmaps.b: expected an integer of 0 or more, found -1"),
        ("NAME.pivoted", ("left",), [[]], "left[0]: expected an object, found []"),
    ],
)  # fmt: skip
def test_errors_say_where_and_what(file: str, steps: Steps, value: Any, error: str) -> None:
    said = content_of(file)
    owner(said, steps)[steps[-1]] = value
    with pytest.raises(UnknownFormat) as caught:
        reread(file, said)
    assert str(caught.value).startswith(error)


@pytest.mark.parametrize(
    ("record", "ours"), [(JobRecord, MirrorOptions), (ExportRecord, ExportInfo)]
)
def test_records_have_all_that_is_to_be_kept(record: type, ours: type) -> None:
    """Of a field that is new here nobody can forget to say how it is kept."""
    assert [one.field for one in members(record)] == [one.name for one in fields(ours)]


KEPT_MODES = [mode for mode in CopyMode if mode is not CopyMode.POINTS]
"""Of these mirrors the state directory has a record."""


@pytest.mark.parametrize(
    ("field", "values"),
    [("copy_mode", KEPT_MODES), ("on_source_error", Policy), ("on_target_error", Policy)],
)
def test_every_option_can_be_kept(field: str, values: Iterable[StrEnum]) -> None:
    for value in values:
        changed: dict[str, Any] = {field: value}
        record = replace(MIRROR, job=replace(JOB, **changed))
        again = load(MirrorRecord, dump(record))
        assert getattr(options_of(again), field) is value


@files
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_refused(file: str, body: bytes) -> None:
    with pytest.raises(UnknownFormat, match=r"expected an object|is not JSON"):
        load(FILES[file], body)


@every_key
def test_keys_of_later_versions_are_ignored(file: str, steps: Steps, member: Member) -> None:
    said = content_of(file)
    later = copy.deepcopy(said)
    owner(later, steps)["a key of a later version"] = {"size": "12"}
    assert reread(file, later) == SAMPLES[file], member.field
