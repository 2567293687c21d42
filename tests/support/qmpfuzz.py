"""Random QMP commands from the schema, right and wrong ones, and what must hold whatever they are.

Names, places and URIs come from small pools, so that commands meet; the places are all on this
machine.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from support.qmpclient import Qmp, Refused
from support.serverprocess import Server
from support.servers import Nbdmirror
from support.waiting import wait_until

from nbdmirror.qmp.commands import COMMANDS
from nbdmirror.qmp.schema import Array, Enum, Plain, StringOr, Struct, Unsigned

Command = tuple[str, Any]

DEVICES = ("disk0", "disk1", "disk2")
TARGETS = ("t0", "t1", "t2", "t3")
"""One more than disks: wherever those have pivoted to, a mirror can begin."""
NEW_NODES = ("n0", "n1", "n2")
NODES = (*TARGETS, *NEW_NODES, "#block000")
JOBS, BITMAPS = ("j0", "j0", "disk0", "j1"), ("b0", "b1")
ODD = ("", " ", "\0", "/", "x" * 300, "ü\u20ac\U0001f600", "a\nb", "%s", "1", "-1", "..", "disk0/")

LEFT_OUT = ("quit",)
"""It does what it says; other tests end the server in the middle of things."""


class Pools:
    """Strings by the name of the argument; `targets` are good ones."""

    def __init__(self, targets: list[Server], own: Nbdmirror) -> None:
        paths = [str(target.socket) for target in targets]
        uris = [target.uri() for target in targets]
        bad_uris = [
            "nbd+unix:///?socket=/nope",
            own.uri(),
            "nbd://127.0.0.1:1/",
            "http://x",
            "nbd://",
        ]
        bad_uris += [
            "nbds://127.0.0.1:1/?tls-psk-file=/nope",
            "nbd+unix:///?socket=%00",
            "nbds://[::1",
        ]
        self._of = {
            "device": [*DEVICES * 2, *JOBS, TARGETS[0]],
            "node": [*DEVICES, TARGETS[0]],
            "target": [*TARGETS * 3, *NEW_NODES, *DEVICES, *BITMAPS * 3, *uris[:1]],
            "node-name": [*NODES, *DEVICES],
            "replaces": [*DEVICES * 2, *NODES],
            "filter-node-name": [*NEW_NODES, TARGETS[0]],
            "file": [*NODES, *DEVICES[:1]],
            "job-id": [*JOBS],
            "id": [*JOBS],
            "name": [*BITMAPS],
            "bitmap": [*BITMAPS],
            "export": ["", "x"],
            "path": [*paths, str(own.socket), str(own.qmp_path), "/nope", "p" * 200],
            "host": [
                "127.0.0.1",
                "localhost",
                "::1",
                "",
                "a b",
                "x" * 300,
                "[",
                "@",
                "/",
                "?socket=/",
            ],
            "port": ["1", "", "99999", "-1", "http", "0x10"],
            "tls-creds": ["/nope", "/", "/dev/null", "", "relative", own.disks[0], "/tmp"],
            "x-nbdmirror-tls-username": ["alice", "a@b", ""],
            "format": ["raw", "nbd", "raw", "qcow2"],
        }
        jobs = {"device": [*JOBS * 3, *DEVICES]}
        new = {"node-name": [*NEW_NODES * 3, *DEVICES]}
        self._of_command = {
            **dict.fromkeys((name for name in COMMANDS if name.startswith("block-job-")), jobs),
            "blockdev-add": new,
            "drive-mirror": {**new, "target": [*uris * 3, *bad_uris, TARGETS[0]]},
        }
        device, sync = st.sampled_from(DEVICES), st.just("full")
        path = st.sampled_from(paths)
        server = st.fixed_dictionaries({"type": st.just("unix"), "path": path})
        self.usual: dict[str, st.SearchStrategy[dict[str, Any]]] = {
            "blockdev-mirror": st.fixed_dictionaries(
                {"device": device, "sync": sync, "target": st.sampled_from(TARGETS)}
            ),
            "drive-mirror": st.fixed_dictionaries(
                {
                    "device": device,
                    "sync": sync,
                    "target": st.sampled_from(uris),
                    "mode": st.just("existing"),
                }
            ),
            "blockdev-add": st.fixed_dictionaries(
                {
                    "node-name": st.sampled_from(NEW_NODES),
                    "driver": st.just("nbd"),
                    "server": server,
                }
            ),
        }
        """Arguments that are right, of what begins things."""

    def of_command(self, command: str) -> Pools:
        """With what is good for this one, where that differs."""
        pools = copy.copy(self)
        pools._of = self._of | self._of_command.get(command, {})
        return pools

    def of(self, name: str) -> st.SearchStrategy[str]:
        """Mostly one that is good somewhere."""
        known = self._of.get(name, [])
        odd = ODD if name != "host" else ()  # nobody is to be looked up
        return st.sampled_from([*known * 20, *odd]) if known else st.sampled_from(ODD)


def commands(pools: Pools) -> st.SearchStrategy[Command]:
    """A command with arguments that are mostly well-typed."""

    def of(name: str) -> st.SearchStrategy[Command]:
        arguments = arguments_of(COMMANDS[name].arguments, pools.of_command(name))
        if name in pools.usual:  # alone, or with more, else what comes behind them is hardly seen
            usual = pools.usual[name]
            more = st.tuples(arguments, usual).map(
                lambda pair: {**pair[0], **pair[1]} if isinstance(pair[0], dict) else pair[1]
            )
            arguments = st.one_of(usual, more, arguments)
        return arguments.map(lambda found: (name, _harmless(found)))

    names = sorted(set(COMMANDS) - set(LEFT_OUT))
    # What begins things twice as often, so that there is something to meet.
    often = ["blockdev-add", "blockdev-mirror", "drive-mirror", "transaction", "job-cancel"]
    known = st.sampled_from([*names, *often]).flatmap(of)
    unknown = st.tuples(st.sampled_from(["", "x", "QUIT", "blockdev-add "]), OBJECT)
    return st.integers(0, 19).flatmap(lambda n: unknown if n == 13 else known)


def _harmless(value: Any) -> Any:
    """Without mirrors that are no whole copies, as they were asked for: where such a one is
    completed a guest rightly finds another disk. The last disk has no guest."""
    if isinstance(value, list):
        return [_harmless(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {name: _harmless(one) for name, one in value.items()}
    if found.get("device") != DEVICES[-1] and isinstance(found.get("sync"), str):
        found["sync"] = "full"
        found.pop("target-is-zero", None)
        found.pop("x-nbdmirror-allow-larger-target", None)
    return found


def arguments_of(struct: Struct, pools: Pools) -> st.SearchStrategy[Any]:
    good = _struct(struct, pools)
    return st.integers(0, 9).flatmap(lambda n: good.flatmap(_spoiled) if n == 7 else good)


JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.sampled_from(ODD)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*ODD, "type", "data", "node"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip

OBJECT = st.dictionaries(st.sampled_from(ODD), JUNK, max_size=2) | JUNK.filter(
    lambda value: not isinstance(value, dict)
)

NUMBERS = st.sampled_from([0, 1, 2, 511, 512, 4096, 65536, 65537, 1 << 20, 1 << 31, (1 << 32) - 1])
SIGNED = NUMBERS | st.sampled_from([-1, -(2**63), 2**63 - 1, 2**32])


def _value(type_: Any, name: str, pools: Pools) -> st.SearchStrategy[Any]:
    if isinstance(type_, Enum):
        return st.sampled_from(type_.values)
    if isinstance(type_, Unsigned):
        # Waiting is not what is tested here.
        return st.sampled_from([0, 1]) if name in ("open-timeout", "reconnect-delay") else NUMBERS
    if isinstance(type_, Array):
        return st.lists(_value(type_.of, name, pools), max_size=3)
    if isinstance(type_, StringOr):
        return pools.of(name if name == "file" else "name") | _value(type_.other, name, pools)
    if isinstance(type_, Struct):
        return _struct(type_, pools)
    assert isinstance(type_, Plain)
    of: dict[type, Callable[[], st.SearchStrategy[Any]]] = {
        bool: st.booleans, int: lambda: SIGNED, str: lambda: pools.of(name),
        float: lambda: SIGNED | st.floats(allow_nan=False, allow_infinity=False),
    }  # fmt: skip
    return of[type_.python]()


def _struct(struct: Struct, pools: Pools) -> st.SearchStrategy[dict[str, Any]]:
    def members(one: Struct) -> st.SearchStrategy[dict[str, Any]]:
        of = {n: _value(m.type, n, pools) for n, m in one.members.items()}
        needed = {n for n, m in one.members.items() if not m.optional}
        optional = sorted(set(of) - needed)
        # With all that there are, one would be wrong nearly always.
        some = st.sets(st.sampled_from(optional), max_size=3) if optional else st.just(set())
        return some.flatmap(
            lambda more: st.fixed_dictionaries({n: of[n] for n in sorted(needed | more)})
        )

    if not struct.tag:
        return members(struct)

    def with_branch(value: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
        return members(struct.branches[value[struct.tag]]).map(lambda more: value | more)

    return members(struct).flatmap(with_branch)


def _spoiled(value: dict[str, Any]) -> st.SearchStrategy[Any]:
    """The same with a member of the wrong type, missing, or too many; or no object at all."""
    names = sorted(value) or [""]
    without = st.sampled_from(names).map(lambda name: {k: v for k, v in value.items() if k != name})
    wrong = st.tuples(st.sampled_from(names), JUNK).map(lambda pair: {**value, pair[0]: pair[1]})
    more = JUNK.map(lambda junk: {**value, "x-more": junk})
    return st.one_of(without, wrong, more, OBJECT)


class Session:
    """A server under fire, and what must hold after each salvo."""

    def __init__(self, server: Nbdmirror, targets: Sequence[Server]) -> None:
        """`targets`: good ones, t0 and so on."""
        self.server = server
        self.good = server.qmp
        self._targets = targets
        self._heard = 0
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def fire(self, salvo: list[Command]) -> None:
        """By two clients, each of which sends all it has at once. Each command is answered, with a
        value or one clear error."""
        with Qmp(self.server.qmp_path) as one, Qmp(self.server.qmp_path) as other:
            shares = {one: salvo[::2], other: salvo[1::2]}
            for client, commands in shares.items():
                requests = [
                    {"execute": name, "arguments": arguments, "id": number}
                    for number, (name, arguments) in enumerate(commands)
                ]
                client.socket.sendall("".join(map(json.dumps, requests)).encode())
            for client, commands in shares.items():
                for number, command in enumerate(commands):
                    self._hear(client, number, command)
        self.check()

    def _hear(self, client: Qmp, number: int, command: Command) -> None:
        answer = client._read()
        while "event" in answer:
            answer = client._read()
        if answer.get("id") != number:  # of what was no command at all the id is not known
            assert "error" in answer and "id" not in answer, (command, answer)
        (self.refused if "error" in answer else self.done)[command[0]] += 1
        if "error" in answer:
            self._check_error(answer["error"], command)

    def _check_error(self, error: dict[str, str], request: Any) -> None:
        text = error["desc"]
        assert "internal error" not in text, f"{request}: {text}\n{self.server.stderr[-3000:]}"
        assert text and "Traceback" not in text, f"{request}: {text!r}"

    def check(self) -> None:
        """It lives, others are served, and it has nothing to be ashamed of in its log."""
        assert self.good.execute("query-status")["running"] is True
        log = Path(self.server._stderr_path).read_text(errors="replace")
        new, self._heard = log[self._heard :], len(log)
        assert "Traceback" not in new and "error in the event loop" not in new, new[-5000:]

    def prepare(self, start: str) -> None:
        """Something to meet: targets, a bitmap; a mirror that is "running", "ready" or "none"."""
        for name, target in zip(TARGETS, self._targets, strict=True):
            if name not in self._nodes():
                self.good.add_target(name, target)
        self.good.execute("block-dirty-bitmap-add", node="disk0", name="b0")
        idle = self._idle_targets()
        assert idle
        if start != "none":
            self.good.start_mirror(idle[0], job_id="j0", speed=1 if start == "running" else 0)
            if start == "ready":
                self.good.wait_ready("j0")

    def _idle_targets(self) -> list[str]:
        """Those that no disk is served from, under whatever name."""
        served, nodes = self._served(), self.good.execute("query-named-block-nodes")
        file_of = {node["node-name"]: node["file"] for node in nodes}
        return [name for name in TARGETS if file_of[name] not in served]

    def _served(self) -> set[str]:
        """What disks are served from."""
        return {block["inserted"]["file"] for block in self.good.execute("query-block")}

    def _nodes(self) -> set[str]:
        return {node["node-name"] for node in self.good.execute("query-named-block-nodes")}

    def clean(self) -> None:
        """As at the start: no jobs, bitmaps or nodes; but where a disk has pivoted, it stays."""
        qmp = self.good
        for job in qmp.execute("query-jobs"):
            if job["status"] != "concluded":
                with suppress(Refused):  # it has ended since
                    qmp.execute("job-cancel", id=job["id"])
        wait_until(self._dismissed, "jobs have gone")
        for block in qmp.execute("query-block"):
            for bitmap in block["inserted"].get("dirty-bitmaps", []):
                place = {"node": block["device"], "name": bitmap["name"]}
                qmp.execute("block-dirty-bitmap-remove", **place)
        served, kept = self._served(), {*DEVICES}
        for node in qmp.execute("query-named-block-nodes"):  # a raw one before what it is on
            name = node["node-name"]
            if node["file"] not in served and name in self._nodes() - kept:
                qmp.execute("blockdev-del", node_name=name)
        qmp.forget()

    def _dismissed(self) -> bool:
        for job in self.good.execute("query-jobs"):
            if job["status"] == "concluded":
                self.good.execute("job-dismiss", id=job["id"])
        return not self.good.execute("query-jobs")
