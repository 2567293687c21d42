"""QMP input of all kinds: bytes into the parser, commands into a server that guests use.

`./run stress` does the same for long."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import jsonfuzz, qmpfuzz
from support.fixtures import Start
from support.guests import Guest
from support.images import MiB, make_image, make_noise
from support.in_parts import given_in_parts
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd

SIZE = MiB
SALVOS, SALVO_MIN, SALVO_MAX = 150, 15, 40

# Bytes

TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b'"',
    b"'",
    b"\\",
    b"\\u",
    b"true",
    b"null",
    b"-",
    b"1e",
]
FRAGMENTS = [
    b'"\\ud83d\\ude00"',
    b'"\\u00',
    b"0",
    b".",
    b"\xfe",
    b"\x00",
    b"\xc3",
    b"\xc3\xa9",
    b" ",
    b"\n",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
TEXTS = VALUES.map(lambda v: json.dumps(v).encode()) | VALUES.map(
    lambda v: json.dumps(v, ensure_ascii=False).encode(errors="replace")
)
BYTES = st.lists(
    st.sampled_from(TOKENS + FRAGMENTS) | st.binary(max_size=4) | TEXTS, max_size=20
).map(b"".join)


@given_in_parts(400, BYTES)
def test_any_bytes(data: bytes) -> None:
    jsonfuzz.check(data)


@given_in_parts(300, TEXTS)
def test_any_json(data: bytes) -> None:
    jsonfuzz.check(data)


@given_in_parts(300, TEXTS, st.data())
def test_json_with_a_flaw(text: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(text)))
    flaw = data.draw(st.sampled_from(TOKENS + FRAGMENTS) | st.binary(max_size=2))
    cut = data.draw(st.integers(0, 3))
    jsonfuzz.check(text[:place] + flaw + text[place + cut :])


@pytest.mark.parametrize(
    "unit", [b"[", b'{"a":', b'"' + b"x" * 999, b"1,", b"[]", b"\\", b"tru", b"9"]
)
def test_without_an_end_memory_is_bounded(unit: bytes) -> None:
    """What is kept never passes the bound, up to the error that ends it, or for ever."""
    data = b"[" + unit * ((4 << 20) // len(unit))
    jsonfuzz.results([data[at : at + 65536] for at in range(0, len(data), 65536)])


# Commands


@pytest.fixture
def session(start: Start, folder: Path) -> Iterator[tuple[qmpfuzz.Session, qmpfuzz.Pools]]:
    """Disks, two of them with a guest, and targets: good ones, one too small, one read-only."""
    disks = [make_image(folder / f"disk{n}.img", SIZE, n + 1) for n in range(3)]
    images = [make_noise(folder / f"target{n}.img", SIZE, n + 7) for n in range(4)]
    targets = [start(QemuNbd(folder, image)) for image in images]
    others = [
        start(NbdkitTarget(folder, "memory", str(SIZE // 2))),
        start(NbdkitTarget(folder, "memory", str(SIZE), options=("-r",))),
    ]
    server = start(Nbdmirror(folder, *disks, bare=True))
    server.allowed = ["."]  # the session looks at the log
    with (
        Guest(server.uri("disk0"), disks[0], seed=1) as first,
        Guest(server.uri("disk1"), disks[1], seed=2) as second,
    ):
        session = qmpfuzz.Session(server, targets)
        yield session, qmpfuzz.Pools([*targets, *others], server)
        session.check()
        for guest in (first, second):
            guest.wait_for_requests(50)
    # Each guest has read at its end what it wrote, wherever its disk is now.


def rounds(session: qmpfuzz.Session, pools: qmpfuzz.Pools, **options: Any) -> Callable[[], None]:
    """A Hypothesis test: salvos of random commands, each from a clean start."""

    @settings(suppress_health_check=list(HealthCheck), **options)
    @given(
        st.sampled_from(["none", "running", "ready"]),
        st.lists(qmpfuzz.commands(pools), min_size=SALVO_MIN, max_size=SALVO_MAX),
    )
    def run(start: str, salvo: list[qmpfuzz.Command]) -> None:
        session.clean()
        session.prepare(start)
        session.fire(salvo)

    return run


@pytest.mark.timeout(240)
def test_any_commands(session: tuple[qmpfuzz.Session, qmpfuzz.Pools]) -> None:
    under_fire, pools = session
    rounds(under_fire, pools, max_examples=SALVOS, derandomize=True)()
    # A fuzzer that is refused at the first check finds nothing. It is the same commands each time,
    # and of each of these dozens are done, in whatever order the two clients' come.
    for command in ("blockdev-add", "blockdev-mirror", "drive-mirror", "transaction", "job-cancel"):
        assert under_fire.done[command] and under_fire.refused[command], command
