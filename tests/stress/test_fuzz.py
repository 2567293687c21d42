"""QMP input for long, with new seeds each time: bytes by atheris, which looks for what takes new
ways through the parser, and commands by Hypothesis."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from support import qmpfuzz
from support.processes import ROOT
from unit.qmp import test_qmp_fuzz
from unit.qmp.test_qmp_fuzz import session  # noqa: F401 - a fixture

pytestmark = pytest.mark.stress

SECONDS = int(os.environ.get("NBDMIRROR_FUZZ_S") or 600)
SALVOS = 20 * SECONDS
"""Some take a tenth of a second, others none."""

SEEDS = [
    b'{"execute": "query-jobs", "id": 1}',
    b"{'execute': 'x', 'arguments': {'a': [1, -2.5e3, true, null, \"\\u00e9\\ud83d\\ude00\"]}}",
    b'[{"a":{}},[],"\\\\\\n"] "x" 18446744073709551615 tru @ }{',
]


def test_bytes(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1, 1 << 31)
    sys.stdout.write(f"seed {seed}\n")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, content in enumerate(SEEDS):
        (corpus / str(number)).write_bytes(content)
    options = [f"-seed={seed}", f"-max_total_time={SECONDS}", "-max_len=4096", "-timeout=20"]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("fuzz_json.py"), corpus, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    found = [path.read_bytes() for path in tmp_path.glob("crash-*")]
    assert done.returncode == 0, f"{found}\n{done.stdout[-3000:]}{done.stderr[-5000:]}"
    assert "Done " in done.stderr, done.stderr[-1000:]


def test_commands(session: tuple[qmpfuzz.Session, qmpfuzz.Pools]) -> None:  # noqa: F811
    under_fire, pools = session
    run = test_qmp_fuzz.rounds(
        under_fire, pools, max_examples=SALVOS, database=None, print_blob=True
    )
    run()
    sys.stdout.write(f"{under_fire.done} {under_fire.refused}\n")
