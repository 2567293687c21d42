"""The guests' load: fio's nbd engine, a process of its own."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.processes import BenchError

START_S_MAX = 30.0
"""What fio may take beyond its run time."""


@dataclass(frozen=True, slots=True)
class Result:
    """What fio saw. Latencies are of completion, in seconds."""

    iops: float
    bytes: int
    bytes_per_s: float
    mean_s: float
    p99_s: float
    max_s: float


class Load:
    """fio at work on `uri` for `seconds`; `with` starts it, `result` waits for its end."""

    def __init__(
        self,
        folder: Path,
        uri: str,
        rw: str,
        *,
        seconds: float,
        block_bytes: int = 4096,
        depth: int = 16,
        options: tuple[str, ...] = (),
    ) -> None:
        self._output = folder / "fio.json"
        self._kind = "read" if "read" in rw else "write"
        self._seconds = seconds
        self._argv = [
            "fio",
            "--name=guest",
            "--ioengine=nbd",
            f"--uri={uri}",
            f"--rw={rw}",
            f"--bs={block_bytes}",
            f"--iodepth={depth}",
            "--time_based",
            f"--runtime={round(seconds * 1000)}ms",
            "--randrepeat=0",
            "--norandommap",
            "--output-format=json",
            f"--output={self._output}",
            *options,
        ]
        self._folder = folder
        self._popen: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._output.unlink(missing_ok=True)
        # fio leaves state files in its working directory.
        self._popen = subprocess.Popen(
            self._argv,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._popen is not None and self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()
        self._output.unlink(missing_ok=True)

    def is_running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def result(self) -> Result:
        assert self._popen is not None
        try:
            said, _ = self._popen.communicate(timeout=self._seconds + START_S_MAX)
        except subprocess.TimeoutExpired as error:
            raise BenchError("fio does not end: a request hangs") from error
        if self._popen.returncode:
            raise BenchError(f"fio failed: {said.decode(errors='replace')[-500:]}")
        text = self._output.read_text()
        text = text[text.index("{") :]  # with several jobs fio has notes before it
        found: dict[str, Any] = json.loads(text)["jobs"][0][self._kind]
        latency = found["clat_ns"]
        return Result(
            iops=found["iops"],
            bytes=found["io_bytes"],
            bytes_per_s=found["bw_bytes"],
            mean_s=latency["mean"] / 1e9,
            p99_s=latency.get("percentile", {}).get("99.000000", 0) / 1e9,
            max_s=latency["max"] / 1e9,
        )


def latencies_s(log: Path, start_s: float, end_s: float) -> list[float]:
    """Of the requests in a fio latency log (--log_unix_epoch=1) that were in flight between two
    moments of time.time(), in seconds. Raises BenchError if there is none."""
    found = []
    for line in log.read_text().splitlines():
        ended_ms, latency_ns = (int(word) for word in line.split(",")[:2])
        if start_s * 1000 <= ended_ms <= end_s * 1000 + latency_ns / 1e6:
            found.append(latency_ns / 1e9)
    if not found:
        raise BenchError("no request in that time")
    return found
