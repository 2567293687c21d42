"""atheris on QMP's input parser: `fuzz_json.py CORPUS [libFuzzer's options]`. It ends with an error
when something does not hold of some bytes, and writes them to a file crash-..."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with atheris.instrument_imports(include=["nbdmirror"]):
    from support import jsonfuzz

atheris.Setup(sys.argv, jsonfuzz.check)
atheris.Fuzz()
