"""Before any test is collected: whose assertions explain themselves, which fixtures all tests have,
and the signals as servers are to inherit them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest

# What tests of one topic share, with assertions that explain themselves as those of tests do.
pytest.register_assert_rewrite(
    "support", "model", "badparts", "cliparts", "copierparts", "devicekinds", "jobdevices",
    "jobparts", "ledgerthreads", "qmpparts", "rulesparts",
)  # fmt: skip

# Tests run side by side on a busy machine: an example may take as long as a test.
hypothesis.settings.register_profile("nbdmirror", deadline=None)
hypothesis.settings.load_profile("nbdmirror")

pytest_plugins = ["support.fixtures", "support.side_by_side"]

# Compiled modules are kept, and not beside their sources: servers start in half the time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault(
    "PYTHONPYCACHEPREFIX", str(Path(__file__).parent.parent / ".cache" / "pycache")
)

# What nohup, or a script that has this in its background, has ignored: servers would inherit it.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler)
