"""./run soak: the matrix of kills, again and again with other seeds, until the time is up; and
beside it one server that lives as long, whose memory, threads and descriptors must stay flat.

It goes on after a round that fails, which it tells at once and how to replay it; the report at the
end, which SIGINT brings forward, has the rest. The exit status is 1 if a round has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import re
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from faults.roundplan import CALM, CELLS, Cell, Outcome  # noqa: E402
from faults.rounds import Round  # noqa: E402
from stress.marathon import MarathonThread  # noqa: E402
from support.fixtures import temporary_folder  # noqa: E402 - found only now
from support.images import KiB  # noqa: E402

UNITS_S = {"s": 1, "m": 60, "h": 3600, "": 60}
MATRIX = [*CELLS, *CALM]


def main() -> int:
    options = arguments()
    soak = Soak()
    seed = options.seed
    say(f"soak: {describe(options)}, seed {seed}")
    deadline_s = soak.began_s + options.time if options.time else None
    with contextlib.ExitStack() as stack:
        if options.cell is MATRIX and deadline_s is not None:
            stack.enter_context(soak.marathon(seed))
        try:
            for cell, number in plan(options.cell, seed, options.passes):
                if deadline_s is not None and time.monotonic() >= deadline_s:
                    break
                if cell == options.cell[0] and number > seed:
                    say(f"soak: {soak.progress()}; on with seed {number}")
                soak.round(cell, number)
        except KeyboardInterrupt:
            say("soak: interrupted; a report of what was done")
    for line in soak.report(seed):
        say(line)
    return 1 if soak.failures else 0


class Soak:
    """What the rounds have done and found."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.outcomes: dict[Cell, list[Outcome]] = {}
        self.failures: list[str] = []
        self._marathon: list[str] = []

    def round(self, cell: Cell, seed: int) -> None:
        said = io.StringIO()
        with (
            temporary_folder() as folder,
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            try:
                outcome = Round(folder, cell, seed).run()
            except Exception as error:  # noqa: BLE001 - told, and the others are run
                self.failures.append(f"--cell '{cell}' --seed {seed}: {error}")
                trace = "".join(traceback.format_exception(error))
            else:
                self.outcomes.setdefault(cell, []).append(outcome)
                return
        say(f"{said.getvalue()}{trace}FAILED; to replay: ./run soak --passes 1 --cell '{cell}' "
            f"--seed {seed}")  # fmt: skip

    @contextlib.contextmanager
    def marathon(self, seed: int) -> Iterator[None]:
        """The server that lives as long as the rounds take."""
        with temporary_folder() as folder:
            thread = MarathonThread(folder, seed)
            thread.start()
            yield
            thread.stop()
        self._marathon = thread.marathon.report()
        if thread.error is not None:
            self.failures.append(f"the long-lived server, --seed {seed}: {thread.error}")
            say("".join(traceback.format_exception(thread.error)))

    @property
    def _all(self) -> list[Outcome]:
        return [outcome for many in self.outcomes.values() for outcome in many]

    def progress(self) -> str:
        took_s = time.monotonic() - self.began_s
        return f"{len(self._all)} rounds, {len(self.failures)} failed, {took_s / 60:.1f} minutes"

    def report(self, seed: int) -> list[str]:
        everything = self._all
        hits = sum((outcome.hits for outcome in everything), Counter[str]())
        ended = [outcome for outcome in everything if outcome.cell.phase == "completing"]
        return [
            *table(self.outcomes),
            "",
            f"seed                       {seed}",
            f"time                       {time.monotonic() - self.began_s:.0f} s",
            f"rounds                     {len(everything)}, and {len(self.failures)} that failed",
            f"guest requests             {sum(outcome.requests for outcome in everything)}",
            f"bytes compared             {sum(outcome.compared_bytes for outcome in everything)}",
            f"hit                        {hits.total()}",
            *(f"  {kind:24} {number}" for kind, number in sorted(hits.items())),
            f"hit in an ending           {len(ended)}",
            f"  had pivoted              {sum(outcome.had_pivoted for outcome in ended)}",
            *self._marathon,
            *(f"FAILED: {failure}" for failure in self.failures),
        ]


def table(outcomes: dict[Cell, list[Outcome]]) -> list[str]:
    """A row a cell, in Markdown."""
    titles = (
        "hit", "when", "guest", "rounds", "sent again, KiB: median, most", "may differ, KiB: most",
        "longest request, ms", "requests over 50 ms",
    )  # fmt: skip
    lines = ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for cell, rounds in outcomes.items():
        again = [one.again_bytes // KiB for one in rounds if one.again_bytes is not None]
        sent = f"{statistics.median(again):.0f}, {max(again)}" if again else "-"
        bound = max(one.bound_bytes for one in rounds) // KiB if again else "-"
        waits = [one.waits for one in rounds if one.waits is not None]
        longest = f"{max(one.longest_s for one in waits) * 1000:.0f}" if waits else "-"
        over = f"{sum(one.over for one in waits)} of {sum(one.requests for one in waits)}"
        row = (cell.what, cell.phase, cell.guest, len(rounds), sent, bound, longest)
        lines.append(f"| {' | '.join(map(str, row))} | {over if waits else '-'} |")
    return lines


def plan(cells: list[Cell], seed: int, passes: int | None) -> Iterator[tuple[Cell, int]]:
    """All cells with the seed, then all with the next one, and so on."""
    number = seed
    while passes is None or number < seed + passes:
        for cell in cells:
            yield cell, number
        number += 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run soak",
        description="Kills guest, target, server and link in each phase of a mirror, again and "
        "again, and compares all that there is to compare.",
    )
    parser.add_argument(
        "time", nargs="?", type=seconds, metavar="TIME", help="as 30s, 20m (or 20), 1h; default: 1h"
    )
    parser.add_argument(
        "--passes", type=int, metavar="N", help="end after the whole matrix was done so often"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.SystemRandom().randrange(1_000_000),
        help="of the first pass, the next one's is larger by one; default: a new one",
    )
    parser.add_argument(
        "--cell",
        type=cell_of,
        action="append",
        metavar="'WHAT, WHEN, GUEST'",
        help="these alone, as the report names them: 'server, READY, busy'",
    )
    options = parser.parse_args()
    options.cell = options.cell or MATRIX
    if options.time is None and options.passes is None:
        options.time = UNITS_S["h"]
    return options


def describe(options: argparse.Namespace) -> str:
    time_ = f"for {options.time} s" if options.time else ""
    passes = f"the matrix {options.passes} times" if options.passes else ""
    return f"{' or '.join(filter(None, (time_, passes)))}, {len(options.cell)} cells"


def seconds(text: str) -> int:
    match = re.fullmatch(r"([1-9]\d*)([smh]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"not a time: '{text}' (as 30s, 20m, 1h)")
    return int(match[1]) * UNITS_S[match[2]]


def cell_of(text: str) -> Cell:
    for cell in MATRIX:
        if str(cell) == text:
            return cell
    raise argparse.ArgumentTypeError(
        f"no such cell: '{text}'; there are {'; '.join(map(str, MATRIX))}"
    )


def say(line: str) -> None:
    assert sys.__stdout__ is not None
    sys.__stdout__.write(f"{line}\n")
    sys.__stdout__.flush()


if __name__ == "__main__":
    sys.exit(main())
