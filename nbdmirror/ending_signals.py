"""The signals that end a command: Ctrl-C; timeout(1) and a supervisor; a terminal or an ssh
connection that ends. A signal that was ignored at the start stays ignored: nohup ignores SIGHUP,
and a script's background ignores SIGINT."""

from __future__ import annotations

import signal
from collections.abc import Iterable

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heeded(signals: Iterable[signal.Signals] = ENDING) -> list[signal.Signals]:
    """Those of `signals` that are not ignored: a command installs handlers for these alone."""
    return [one for one in signals if signal.getsignal(one) is not signal.SIG_IGN]
