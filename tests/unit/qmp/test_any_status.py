"""Whatever a status may have by its schema, and whatever of that it lacks, is put into words: a
server leaves out what it does not know, and an older one has never heard of some keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdmirror.cli.status import text
from nbdmirror.explanation import explanation, shares
from nbdmirror.qmp.results import DISK_STATUS, JOB_STATUS
from nbdmirror.qmp.schema import Array, Enum, Member, Plain, Struct, Type, Unsigned

NUMBERS = st.one_of(st.just(0), st.floats(0, 1e6, allow_nan=False), st.just(0.1 + 0.2))
WHOLE = st.one_of(st.just(0), st.integers(0, 2**40))
PLAIN: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: WHOLE,
    float: NUMBERS,
    str: st.sampled_from(("", "vda", "no answer")),
}


def any_of(type_: Type) -> st.SearchStrategy[Any]:
    """Values of a type of the schema."""
    if isinstance(type_, Plain):
        return PLAIN[type_.python]
    if isinstance(type_, Unsigned):
        return WHOLE
    if isinstance(type_, Enum):
        return st.sampled_from(type_.values)
    if isinstance(type_, Array):
        return st.lists(any_of(type_.of), max_size=2)
    assert isinstance(type_, Struct) and not type_.tag
    return members_of(type_.members)


def members_of(members: Mapping[str, Member]) -> st.SearchStrategy[dict[str, Any]]:
    needed = {name: any_of(one.type) for name, one in members.items() if not one.optional}
    others = {name: any_of(one.type) for name, one in members.items() if one.optional}
    return st.fixed_dictionaries(needed, optional=others)


A_DISK = members_of(
    {name: one for name, one in DISK_STATUS.members.items() if not isinstance(one.type, Array)}
)


OPTIONAL = sorted(name for name, one in JOB_STATUS.members.items() if one.optional)
HAVE_PARTS = [name for name in OPTIONAL if isinstance(JOB_STATUS.members[name].type, Struct)]


@settings(max_examples=300)
@given(any_of(JOB_STATUS), A_DISK, st.none() | st.just("no space"))
def test_a_server(job: dict[str, Any], disk: dict[str, Any], problem: str | None) -> None:
    told(job, disk, problem)


@pytest.mark.parametrize("name", HAVE_PARTS)
@settings(max_examples=300)
@given(job=any_of(JOB_STATUS), disk=A_DISK, parts=st.data())
def test_a_job_that_has_little_else_to_say(
    name: str, job: dict[str, Any], disk: dict[str, Any], parts: st.DataObject
) -> None:
    """Nothing is said in the place of it."""
    few: dict[str, Any] = {key: one for key, one in job.items() if key not in OPTIONAL}
    few |= {"status": "ready", "ready": True, "io-status": "ok", "ending": "none", "paused": False}
    for key in {"waits", name}:
        few[key] = parts.draw(any_of(JOB_STATUS.members[key].type))
    told(few, disk, None)


def told(job: dict[str, Any], disk: dict[str, Any], problem: str | None) -> None:
    JOB_STATUS.check(job)
    assert all(explanation(job))
    assert shares(job)
    status: dict[str, Any] = {"disks": [{**disk, "jobs": [job], "bitmaps": []}]}
    if problem is not None:
        status["state-error"] = problem
    assert text(status)
