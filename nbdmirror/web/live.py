"""Pages that change by themselves, by server-sent events. Their content is made once for all pages.

A message has a part of the page as a string of JSON: names may have line ends, which end messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nbdmirror.limits import whole_number
from nbdmirror.web import page
from nbdmirror.web.host import Host

EVENTS = "/events"
"""The path."""
LISTENERS_MAX = 16
REFRESH_S = 1.0
"""A page changes no more often."""
SILENCE_S_MAX = 15.0
"""A page gets a sign of life after so long without another message. Only a message shows the page,
and this process, that the other one is gone."""
SILENT_MS = 45_000
"""A page that has heard nothing for longer says that it is not live."""
LISTENING_S_MAX = 300.0
"""Then a page asks again, by itself: one that is gone without a word does not keep its place."""
AGAIN_MS = 2000


class Live:
    """`name`: the host's."""

    def __init__(self, host: Host, name: str) -> None:
        self._host = host
        self._name = name
        self._listeners = 0
        self._made = ""
        self._made_of = -1

    def page(self) -> str:
        return page.page(self._name, self._servers(), self._host.history, SILENT_MS)

    def _servers(self) -> str:
        """As of now; made once for all."""
        if self._made_of != self._host.version:
            self._made_of = self._host.version
            host = self._host
            self._made = page.servers_html(host.reports, host.history, host.unanswered)
        return self._made

    async def listen(self, request: Request) -> Response:
        if self._listeners >= LISTENERS_MAX:
            text = f"there are {LISTENERS_MAX} open pages already"
            return PlainTextResponse(text, status_code=503, headers={"Retry-After": "10"})
        after = whole_number(request.headers.get("last-event-id", ""), 0, 2**53)
        return _Stream(self, self._messages(after or 0))

    async def _messages(self, newest: int) -> AsyncIterator[str]:
        """`newest`: the number of the last event that is there already."""
        loop = asyncio.get_running_loop()
        said_s = loop.time()
        end_s = said_s + LISTENING_S_MAX
        shown, version = "", -1
        yield f"retry: {AGAIN_MS}\n\n"
        while loop.time() < end_s:
            messages, version = [], self._host.version
            if (html := self._servers()) != shown:
                shown = html
                messages.append(_message("servers", html, newest))
            if notes := [note for note in self._host.history.notes if note.number > newest]:
                newest = notes[0].number
                messages.append(_message("events", page.events_html(notes), newest))
            if not messages and loop.time() - said_s >= SILENCE_S_MAX:
                messages.append(_message("alive", "", newest))
            for message in messages:
                said_s = loop.time()
                yield message
            await self._news(version, said_s + SILENCE_S_MAX)
            await asyncio.sleep(REFRESH_S)

    async def _news(self, version: int, until_s: float) -> None:
        """Returns when there is anything newer than `version`, or at that time of the loop."""
        if self._host.version == version:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until_s):
                    await self._host.changed()


def _message(kind: str, html: str, newest: int) -> str:
    return f"event: {kind}\nid: {newest}\ndata: {json.dumps(html)}\n\n"


class _Stream(StreamingResponse):
    """Counts as a listener as long as it lasts, however it ends."""

    def __init__(self, live: Live, messages: AsyncIterator[str]) -> None:
        super().__init__(messages, media_type="text/event-stream")
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._live._listeners += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._live._listeners -= 1
