"""A headless Chromium, spoken to over a pipe in its DevTools protocol: messages of JSON, each ended
by a zero byte."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from select import select
from typing import Any, Self

from support.waiting import WAIT_S_MAX, wait_until

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser")
OPTIONS = (
    "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
    "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
END_S_MAX = 10.0

Message = dict[str, Any]


def found() -> str | None:
    """The program; ./run installs it where the distribution has it."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One, with one page. `said`: what the page has said to its console, or has done wrong."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        """The addresses that it has asked for."""
        self._numbers = itertools.count(1)
        self._rest = b""

    def __enter__(self) -> Self:
        program = found()
        assert program is not None
        self._place = tempfile.TemporaryDirectory(prefix="nbdmirror-browser-")
        far_in, self._out = os.pipe()
        self._in, far_out = os.pipe()

        # Chromium reads its descriptor 3 and writes to its 4.
        wire = f'exec "$0" "$@" 3<&{far_in} 4>&{far_out}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", wire, program, *OPTIONS, f"--user-data-dir={self._place.name}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(far_in, far_out),
        )
        os.close(far_in)
        os.close(far_out)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self._call("Browser.close")
        try:
            self._process.wait(END_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_S_MAX)
        os.close(self._in)
        os.close(self._out)
        self._place.cleanup()

    def open(self, url: str) -> None:
        """Returns when the page can be looked at."""
        self.call("Page.navigate", url=url)
        wait_until(lambda: self.value("document.readyState") == "complete", f"{url} is loaded")

    def value(self, script: str) -> Any:
        """Of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, f"{script}: {found}"
        return found["result"].get("value")

    def text(self, selector: str = "body") -> str:
        """As it is shown."""
        script = f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"
        return str(self.value(script))

    def size(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def scheme(self, scheme: str) -> None:
        """dark or light."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        """Of the whole page, as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def call(self, method: str, **parameters: Any) -> Message:
        """A command to the page."""
        return self._call(method, self._session, **parameters)

    def _call(self, method: str, session: str = "", **parameters: Any) -> Message:
        number = next(self._numbers)
        message: Message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + WAIT_S_MAX
        while (answer := self._read(deadline_s)).get("id") != number:
            self._listen(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def _read(self, deadline_s: float) -> Message:
        while b"\0" not in self._rest:
            left_s = max(0.0, deadline_s - time.monotonic())
            assert select([self._in], [], [], left_s)[0], "the browser does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(text))

    def _listen(self, event: Message) -> None:
        method, told = event.get("method", ""), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.said.append(str(told["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.said.append(str(told["entry"]["text"]))
        elif method == "Runtime.consoleAPICalled":
            self.said.append(str(told["args"]))
        elif method == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])
