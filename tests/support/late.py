"""A target that is late, and what tests of it share: holding.py, run by nbdkit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import free_port
from support.qmpclient import Refused
from support.servers import NbdkitTarget
from support.waiting import wait_until

REFUSED_S_MAX = 5.0
"""Of a refusal; a handshake with a server that hangs takes ten."""

PLUGIN = Path(__file__).with_name("holding.py")


class Holding(NbdkitTarget):
    """holding.py of `image`."""

    name = "holding"

    def __init__(
        self, folder: Path, image: Path, *, multi_conn: bool = True, tcp: bool = False
    ) -> None:
        self.hold = folder / "hold"
        self.last = folder / "hold.last"
        """While there is this file the oldest request is not carried out."""
        self.held = folder / "held"
        settings = (f"image={image}", f"hold={self.hold}", f"held={self.held}")
        multi = f"multi-conn={int(multi_conn)}"
        super().__init__(folder, "python", str(PLUGIN), *settings, multi, options=("-t", "8"))
        self.image = image
        self.port = free_port() if tcp else 0

    def is_holding(self) -> bool:
        """A request waits to be let go."""
        return self.held.exists()

    def argv(self) -> list[str]:
        argv = super().argv()
        return (
            [*argv[:2], "-i", "127.0.0.1", "-p", str(self.port), *argv[4:]] if self.port else argv
        )

    def uri(self, export: str = "") -> str:
        return f"nbd://127.0.0.1:{self.port}/{export}" if self.port else super().uri(export)


def refused(start_mirror: Callable[[], None]) -> str:
    began_s = time.monotonic()
    with pytest.raises(Refused, match="has not answered all requests of a mirror") as caught:
        start_mirror()
    assert time.monotonic() - began_s < REFUSED_S_MAX
    return str(caught.value)


def started(start_mirror: Callable[[], None]) -> None:
    """When the server has answered."""

    def is_started() -> bool:
        with contextlib.suppress(Refused):
            start_mirror()
            return True
        return False

    wait_until(is_started, "a mirror is taken again")
