"""`nbdmirror list` and `nbdmirror status --all`: the servers of this host, found by the default
control sockets and among the processes. Servers that this user may not query are listed with that
reason."""

from __future__ import annotations

import argparse
import asyncio
import glob
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Any

from qemu.qmp import QMPError

from nbdmirror.cli import status as cli_status
from nbdmirror.cli import words as cli_words
from nbdmirror.cli.common import DONE, NO_SERVER, TIMED_OUT, CliError, default_qmp_paths
from nbdmirror.cli.session import Session, connect, run_interruptible
from nbdmirror.local_servers import has_proc, processes
from nbdmirror.paths import absolute_path

PLACES = ("/run/nbdmirror.qmp", "/run/nbdmirror/*/qmp", "/run/user/*/nbdmirror.qmp")
"""The sockets of root's server, of the systemd units, and of users' servers."""
PLUGIN = "nbdmirror-plugin.py"
ANSWER_S_MAX = 5.0
AT_ONCE_MAX = 16
"""So many servers are queried at a time: one that hangs delays few others."""
ADVICE = (
    "the server has just ended, or its control socket was removed (SIGTERM ends it in order), "
    "or it runs in a container with other files"
)


@dataclass(frozen=True, slots=True)
class Found:
    """A possible server. `pid` 0: not known; `socket` empty: it has none."""

    pid: int
    socket: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's status, or the reason why there is none. `status`: the exit status for that."""

    record: dict[str, Any]
    status: int = DONE


def run(args: argparse.Namespace) -> int:
    """`list` succeeds in any case; `status --all` only if every server has answered."""
    return run_interruptible(_run(args))


async def _run(args: argparse.Namespace) -> int:
    answers = await _ask_all(find())
    servers = [answer.record for answer in answers]
    nobody = "no server was found on this host"
    if not has_proc():
        nobody += " at the default control sockets; without /proc the others are not known"
    if args.json:
        print(json.dumps(servers, indent=2))
    elif servers or args.command == "list":
        print("\n".join(map(_text, servers)) or nobody)
    if args.command == "list":
        return DONE
    if not servers:
        raise CliError(
            f"{nobody}: start one, or name its control socket in NBDMIRROR_QMP", NO_SERVER
        )
    return max(answer.status for answer in answers)


def find() -> list[Found]:
    """All processes, and sockets whose process was not found."""
    processes = _processes()
    named = [*filter(None, [os.environ.get("NBDMIRROR_QMP")])]
    try:
        named += default_qmp_paths()
    except CliError:
        pass  # this user has no default path
    paths = [path for pattern in PLACES for path in sorted(glob.glob(pattern))]
    paths += [absolute_path(path) for path in named if os.path.lexists(path)]
    sockets = [found.socket for found in processes]
    more = one_each([*filter(None, sockets), *paths])[len(one_each(filter(None, sockets))) :]
    return processes + [Found(0, path) for path in more]


def one_each(sockets: Iterable[str]) -> list[str]:
    """The first path of each socket, which may have several. A socket that does not exist is known
    by its path."""
    found: dict[object, str] = {}
    for path in sockets:
        try:
            status = os.stat(path)
        except OSError:
            found.setdefault(path, path)
        else:
            found.setdefault((status.st_dev, status.st_ino), path)
    return list(found.values())


def _processes() -> list[Found]:
    """The processes of all users that run the plugin."""
    found = []
    for entry in processes():
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                words = [os.fsdecode(word) for word in file.read().split(b"\0")]
        except OSError:
            continue  # ended meanwhile
        if "python" in words and any(os.path.basename(word) == PLUGIN for word in words):
            found.append(Found(entry, _socket(words, entry)))
    return found


def _socket(words: list[str], pid: int) -> str:
    """The plugin's control socket. A relative path was relative to the directory in which the
    process was started; in the background it has another one, but its socket has the full path."""
    path = next((word[4:] for word in reversed(words) if word.startswith("qmp=")), "")
    if not path or os.path.isabs(path):
        return path
    ending = absolute_path("/" + path.rpartition("../")[2])
    with suppress(OSError):
        held = set(_links(f"/proc/{pid}/fd"))
        with open(f"/proc/{pid}/net/unix", encoding="utf-8", errors="surrogateescape") as table:
            for row in table:  # proc(5): the inode is the seventh word, and a path follows
                *_, inode, bound = [*row.rstrip("\n").split(maxsplit=7), ""][:8]
                if f"socket:[{inode}]" in held and bound.endswith(ending):
                    return bound
        return os.path.join(os.readlink(f"/proc/{pid}/cwd"), path)
    return path


def _numbers(pid: int) -> list[int]:
    """The numbers of a process, which has another one in a container; [] if they are not known."""
    with suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith("NSpid:"):
                return list(map(int, line.split()[1:]))
    return []


def _links(folder: str) -> Iterator[str]:
    for name in os.listdir(folder):
        with suppress(OSError):  # closed meanwhile
            yield os.readlink(f"{folder}/{name}")


def _connect(found: Found) -> AbstractAsyncContextManager[Session]:
    return connect(found.socket, advice=ADVICE) if found.pid else connect(found.socket)


async def _ask_all(all_found: list[Found]) -> list[Answer]:
    """In the order of `all_found`."""
    places = asyncio.Semaphore(AT_ONCE_MAX)

    async def ask(found: Found) -> Answer:
        async with places:
            return await _ask(found)

    return await asyncio.gather(*map(ask, all_found))


async def _ask(found: Found) -> Answer:
    server: dict[str, Any] = {"qmp": found.socket}
    if found.pid:
        server["pid"] = found.pid

    def refused(error: str, status: int) -> Answer:
        return Answer({**server, "error": error}, status)

    if not found.socket:
        return refused("the server has no control socket", NO_SERVER)
    try:
        async with asyncio.timeout(ANSWER_S_MAX), _connect(found) as session:
            status = await session.status()
            numbers, answered = _numbers(found.pid), status.get("pid")
            if numbers and answered is not None and answered not in numbers:
                text = f"the control socket was removed, and process {answered} has its place now"
                return refused(f"{text}; SIGTERM ends this one in order", NO_SERVER)
            return Answer({**server, "package": session.package, **status})
    except CliError as error:
        return refused(str(error), error.status)
    except TimeoutError:
        return refused(f"no answer within {ANSWER_S_MAX:g} s", TIMED_OUT)
    except (QMPError, OSError, EOFError):
        return refused("lost the connection to the server", NO_SERVER)


def _text(server: dict[str, Any]) -> str:
    pid = f"  process {server['pid']}" if "pid" in server else ""
    head = f"{server['qmp'] or 'no control socket'}{pid}"
    if "error" in server:
        return f"{head}\n  {server['error']}"
    try:
        lines = cli_status.text(server).splitlines()
    except Exception as error:  # noqa: BLE001 - the others are to be shown nevertheless
        lines = [cli_words.not_understood(error)]
    return "\n".join([head, *(f"  {line}" for line in lines)])
