"""`nbdmirror web`: finds the servers' control sockets and holds the conversations; nbdmirror.web
shows their answers."""

from __future__ import annotations

import argparse
import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import AsyncIterator
from typing import Any

from qemu.qmp import QMPError

from nbdmirror.cli.common import DONE, NO_SERVER, CliError
from nbdmirror.cli.list import find, one_each
from nbdmirror.cli.places import bound
from nbdmirror.cli.session import Session, connect, no_socket, run_interruptible
from nbdmirror.cli.status import event_text, is_routine
from nbdmirror.cli.streams import say
from nbdmirror.errors import ConfigError
from nbdmirror.paths import absolute_path
from nbdmirror.web.host import News, NoAnswer
from nbdmirror.web.service import serve

BACKLOG = 128


def run(args: argparse.Namespace) -> int:
    for path in args.sockets:
        _check(absolute_path(path))
    host, port = args.listen
    listeners = _listen(host, port)
    say(f"nbdmirror: serving http://{f'[{host}]' if ':' in host else host}:{port}/")
    return run_interruptible(_run(args.sockets, listeners), ())  # the web server hears of signals


async def _run(places: list[str], listeners: list[socket.socket]) -> int:
    await serve(
        listeners,
        find=(Places(places) if places else OfHost()).sockets,
        connect=_connect,
        is_loopback=all(map(_is_loopback, listeners)),
    )
    return DONE


@contextlib.asynccontextmanager
async def _connect(path: str) -> AsyncIterator[_Conversation]:
    try:
        async with connect(path) as session:
            yield _Conversation(session)
    except TimeoutError:  # the caller's
        raise
    except CliError as error:
        raise NoAnswer(str(error)) from error
    except (QMPError, OSError, EOFError) as error:
        raise NoAnswer("lost the connection to the server") from error


class _Conversation:
    """What nbdmirror.web asks of a session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def status(self) -> dict[str, Any]:
        return await self._session.status()

    async def job_map(self, job: str, cells: int) -> dict[str, Any]:
        return await self._session.job_map(job, cells)

    async def events(self) -> list[News]:
        first = await self._session.events.get()
        events = [dict(event) for event in (first, *self._session.events.clear())]
        return [News(event_text(one).partition(" ")[2], is_routine(one)) for one in events]


def _check(place: str) -> None:
    """What is there must be a socket, or a directory that can be looked into. What is not there may
    come yet, with its server."""
    try:
        if os.path.isdir(place):
            os.listdir(place)
        elif reason := no_socket(place):
            raise CliError(f"no server at {place} ({reason}): name a control socket", NO_SERVER)
        elif not os.path.lexists(place):
            say(f"nbdmirror: warning: {place}: does not exist; its server may start yet")
    except OSError as error:
        raise CliError(f"{place}: {error.strerror}", NO_SERVER) from error


class OfHost:
    """The sockets of the servers that `nbdmirror list` finds. A server that was killed, and was
    found by its process, is known by the file that its socket has left."""

    def __init__(self) -> None:
        self._known: list[str] = []

    def sockets(self) -> list[str]:
        """There now, or expected."""
        there = [found.socket for found in find() if found.socket]
        self._known = one_each([*there, *filter(os.path.lexists, self._known)])
        return self._known


class Places:
    """Sockets, and directories of such. In a directory are those that are called `qmp` or `*.qmp`,
    and those in directories below, as the systemd units have them."""

    def __init__(self, paths: list[str]) -> None:
        """A path that ends with a / is that of a directory, which may not exist yet."""
        self._paths = list(map(absolute_path, paths))
        self._directories = {absolute_path(path) for path in paths if path.endswith("/")}
        """Also those that are not there at the moment."""

    def sockets(self) -> list[str]:
        """There now, or expected."""
        found: list[str] = []
        for path in self._paths:
            if os.path.isdir(path):
                self._directories.add(path)
            if path in self._directories:
                found += _in_directory(path, depth=2)
            else:
                found.append(path)
        return one_each(found)


def _in_directory(folder: str, depth: int) -> list[str]:
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError:
        return []  # it has just gone, or is another user's
    found = []
    for entry in entries:
        with contextlib.suppress(OSError):
            if entry.is_dir() and depth > 1:
                found += _in_directory(entry.path, depth - 1)
            elif entry.name == "qmp" or entry.name.endswith(".qmp"):
                found += [entry.path] if stat.S_ISSOCK(entry.stat().st_mode) else []
    return found


def _listen(host: str, port: int) -> list[socket.socket]:
    try:
        sockets = bound(host, port, "--listen", "--listen")
        for one in sockets:
            one.listen(BACKLOG)
    except ConfigError as error:
        raise CliError(str(error)) from error
    except OSError as error:  # the port was taken between the two
        text = f"--listen: cannot listen on {host} port {port}: {os.strerror(errno.EADDRINUSE)}"
        raise CliError(text) from error
    return sockets


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
