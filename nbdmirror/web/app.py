"""The paths and their answers. Nothing can be changed."""

from __future__ import annotations

import ipaddress
import os
import re

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nbdmirror.web.host import Host
from nbdmirror.web.live import EVENTS, Live
from nbdmirror.web.metrics import rendered
from nbdmirror.web.page import FOLDER

_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", _POLICY),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
]
"""Of every answer."""


def application(host: Host, *, is_loopback: bool) -> ASGIApp:
    """`is_loopback`: only this machine can connect."""

    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        content, content_type = rendered(host.reports, accept, host.clock())
        return Response(content, headers={"Content-Type": content_type})

    async def status(request: Request) -> Response:
        now_s = host.clock()
        return JSONResponse([report.as_json | report.age(now_s) for report in host.reports])

    async def healthz(request: Request) -> Response:
        found = host.reports
        answer = {
            "status": "ok",
            "servers": len(found),
            "not-answering": {one.socket: one.error for one in found if one.error},
        }
        if host.left_out:
            answer["left-out"] = host.left_out
        return JSONResponse(answer)

    live = Live(host, os.uname().nodename)

    async def page(request: Request) -> Response:
        return HTMLResponse(live.page())

    routes = [
        Route("/", page),
        Route(EVENTS, live.listen),
        *map(_file, ("page.css", "page.js")),
        Route("/metrics", metrics),
        Route("/status", status),
        Route("/healthz", healthz),
    ]
    app = Starlette(routes=routes)
    return _LoopbackNames(app) if is_loopback else app


def _file(name: str) -> Route:
    content = (FOLDER / name).read_text()
    kind = {".css": "text/css", ".js": "text/javascript"}[name[name.index(".") :]]

    async def file(request: Request) -> Response:
        return Response(content, media_type=kind)

    return Route(f"/{name}", file)


class _LoopbackNames:
    """Refuses requests to other names than this machine has for itself. A page in a browser on this
    machine could otherwise read all, if the name that the page came from is given the address
    127.0.0.1 afterwards (DNS rebinding)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Request(scope).headers.get("host", "") if scope["type"] == "http" else ""
        app = self._app
        if not _is_ours(host):
            text = f"{host!r} is no name of the loopback interface: ask for localhost"
            app = PlainTextResponse(text, status_code=421)
        await app(scope, receive, send)


def _is_ours(host: str) -> bool:
    """Of a Host header. Programs that send none are no browsers."""
    name = re.sub(r":[0-9]*$", "", host)
    if name.lower().rstrip(".") in ("", "localhost"):
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
