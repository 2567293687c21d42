"""nbdmirror: an NBD server with built-in live mirroring to a second NBD export.

If a Python that cannot run the package imports it, the process ends with one line. So this file
must be valid in old versions of Python."""

import sys

__version__ = "0.1.0"

_PYTHON_MIN = (3, 11)


def _refuse_python() -> None:
    version = sys.version.split()[0]
    if sys.version_info[:2] < _PYTHON_MIN:
        sys.exit(f"nbdmirror: needs Python 3.11 or later, and this is {version}")
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        # The ledger's marks are single steps under the GIL, without locks (ledger.py).
        sys.exit(
            f"nbdmirror: this Python {version} is free-threaded, and guests' writes are tracked "
            f"rightly only with the GIL: use an ordinary build, or PYTHON_GIL=1"
        )


_refuse_python()
