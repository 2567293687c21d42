"""The HTTP server and its bounds: no client can take all connections, hold one for ever, or keep
the server from ending.

A connection is for one request and lasts ten seconds at most, so no client has to be watched. If
there are too many connections, the oldest is closed. Pages that change by themselves keep theirs
for longer; there are few of them, and their clients must read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from nbdmirror.ending_signals import heeded
from nbdmirror.web.app import HEADERS, application
from nbdmirror.web.host import Connect, Find, Host
from nbdmirror.web.live import EVENTS

CONNECTIONS_MAX = 64
CONNECTION_S_MAX = 10.0


async def serve(
    sockets: list[socket.socket], *, find: Find, connect: Connect, is_loopback: bool
) -> None:
    """Serve on sockets that listen, until SIGINT or SIGTERM."""
    host = Host(find, connect, time.time, time.monotonic)
    watching = asyncio.ensure_future(host.run())
    server = _Server(_config(application(host, is_loopback=is_loopback)))
    watching.add_done_callback(lambda _: server.end())
    try:
        await server.serve(sockets)
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=_Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        headers=[*HEADERS, ("Connection", "close")],
    )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._heeded = heeded()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal is the way this is meant to end: it is not raised again afterwards."""
        if sig in self._heeded:
            self.end()

    def end(self) -> None:
        """Also from a signal's handler."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No client is waited for."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await super().shutdown(sockets)


class _Connection(H11Protocol):
    """One client's."""

    _is_aborted = False
    """It is still one of `connections` for a moment."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._began_s = self.loop.time()
        self._limit = self.loop.call_later(CONNECTION_S_MAX, self._end)
        others = [one for one in self.connections if isinstance(one, _Connection)]
        others = [one for one in others if not (one._is_aborted or one._is_listening)]
        if len(others) > CONNECTIONS_MAX:
            min(others, key=lambda one: one._began_s).abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit.cancel()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Hang up, whatever is still to be sent."""
        self._is_aborted = True
        self.transport.abort()

    def _end(self) -> None:
        if self._is_listening and not self.flow.write_paused:
            self._limit = self.loop.call_later(CONNECTION_S_MAX, self._end)
        else:
            self.abort()

    @property
    def _is_listening(self) -> bool:
        is_answered = getattr(self.cycle, "response_complete", True)  # None before a request
        return not is_answered and self.scope["path"] == EVENTS
