"""A guest's load by fio, over NBD, for as long as it is wanted, with a log of how long each write
took."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from support.waiting import STOP_S_MAX

LONG_S = 3600


class FioLoad:
    """fio at work between `with` and `stop`, which reads its log. `options` as of the command."""

    def __init__(self, folder: Path, uri: str, options: tuple[str, ...]) -> None:
        self._folder = folder / "fio"
        self._log = self._folder / "log"
        self._argv = [
            "fio", "--name=guest", "--ioengine=nbd", f"--uri={uri}", "--norandommap",
            "--randrepeat=0", "--time_based", f"--runtime={LONG_S}", "--log_unix_epoch=1",
            "--thread",  # one process, which ends with its first thread
            "--disable_clat=1", "--disable_slat=1", f"--write_lat_log={self._log}",
            "--output=/dev/null", *options,
        ]  # fmt: skip
        self._popen: subprocess.Popen[bytes] | None = None
        self.writes: list[tuple[float, float]] = []
        """When each write has ended, in seconds since 1970, and how long it took in seconds."""

    def __enter__(self) -> Self:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        # fio leaves state files in its working directory.
        self._popen = subprocess.Popen(
            self._argv, cwd=self._folder, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._popen is not None:
            self._popen.kill()
            self._popen.communicate()

    def stop(self) -> Self:
        assert self._popen is not None
        assert self._popen.poll() is None, f"fio has ended: {self._popen.communicate()[0]!r}"
        self._popen.send_signal(signal.SIGINT)
        self._popen.communicate(timeout=STOP_S_MAX)
        log = Path(f"{self._log}_lat.1.log")
        for line in log.read_text().splitlines() if log.exists() else ():
            ended_ms, latency_ns, direction = (int(word) for word in line.split(",")[:3])
            if direction == 1:
                self.writes.append((ended_ms / 1000, latency_ns / 1e9))
        return self

    def longest_s(self, start_s: float, end_s: float) -> float:
        """Of the writes that were in flight between these moments; 0 if there was none."""
        return max(self._between(start_s, end_s), default=0.0)

    def p999_s(self, start_s: float, end_s: float) -> float:
        """The 99.9th percentile of the same; there must be some."""
        found = sorted(self._between(start_s, end_s))
        return found[min(len(found) - 1, len(found) * 999 // 1000)]

    def _between(self, start_s: float, end_s: float) -> list[float]:
        return [took for at, took in self.writes if at >= start_s and at - took <= end_s]

    def longest_besides_s(self, windows: list[tuple[float, float]]) -> float:
        """Of the writes that were in flight in none of these."""
        return max(
            (
                took
                for at, took in self.writes
                if not any(at >= start and at - took <= end for start, end in windows)
            ),
            default=0.0,
        )
