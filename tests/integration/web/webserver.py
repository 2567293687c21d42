"""`nbdmirror web` as a process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from support.madeservers import get
from support.processes import free_port, nbdmirror_environment
from support.serverprocess import Server


class Web(Server):
    """Of the control sockets, or directories of such, that are given."""

    name = "web"
    layer = 2
    unwanted = r"Traceback|ERROR|[Ee]xception"

    def __init__(
        self, folder: Path, *places: Path | str, environment: dict[str, str] | None = None
    ):
        super().__init__(folder)
        self.port = free_port()
        self.places = places
        self._environment = environment or {}

    def argv(self) -> list[str]:
        places = map(str, self.places)
        listen = f"127.0.0.1:{self.port}"
        return [sys.executable, "-m", "nbdmirror", "web", *places, "--listen", listen]

    def environment(self) -> dict[str, str]:
        return nbdmirror_environment() | self._environment

    def is_ready(self) -> bool:
        try:
            return self.get("/healthz")[0] == 200
        except OSError:
            return False

    def get(self, path: str) -> tuple[int, str]:
        return get(self.port, path)

    def json(self, path: str) -> Any:
        return json.loads(self.get(path)[1])
