"""When a mirror will be READY, as predicted, against when it was: fio's loads over links of three
kinds. Records, and does not judge, how far off a prediction is: that depends on the machine. (The
same with a clock that is not the machine's: unit/mirror/test_outlook.py.) NBDMIRROR_PROFILES has
the number of loads, of 20, or a word that their names have."""

from __future__ import annotations

import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e.hosts import LINK, Host, Hosts, QemuNbdAt, answers, two_hosts
from stress.fioload import FioLoad
from support.fixtures import Start
from support.images import KiB, MiB, assert_identical, make_image
from support.seeds import SEED
from support.serverprocess import Server
from support.servers import Nbdmirror, OnTcp

pytestmark = [pytest.mark.stress, pytest.mark.timeout(0)]

PROFILES = os.environ.get("NBDMIRROR_PROFILES") or "3"
LONGEST = 4.0
"""A copy that takes so many times what it would take without guests is given up."""

LOOK_S = 0.5
SLACK = 0.02
GRANULE = 64 * KiB


@dataclass(frozen=True)
class Link:
    """`bytes_per_s`: what a copy takes. `size`: of the disk. `shape`: arguments of tc."""

    name: str
    bytes_per_s: float
    size: int
    speed: int = 0
    shape: tuple[str, ...] = ()
    delay_ms: int = 0
    """Of each write, by nbdkit: not every kernel has netem."""


LINKS = (
    Link("none, the job's speed 32 MiB/s", 32 * MiB, 256 * MiB, speed=32 * MiB),
    Link(
        "100 Mbit/s",
        11.5e6,
        96 * MiB,
        shape=("tbf", "rate", "100mbit", "burst", "64kb", "latency", "50ms"),
    ),
    Link(
        "1 Gbit/s, 10 ms",
        110e6,
        768 * MiB,
        shape=("tbf", "rate", "1gbit", "burst", "1mb", "latency", "50ms"),
        delay_ms=20,
    ),
)


@dataclass(frozen=True)
class Profile:
    """`share`: how much writes make dirty at most, as part of what the copy takes. fio's rate is
    that of writes, and of reads beside them."""

    name: str
    share: float
    block: int
    options: tuple[str, ...]

    def rate(self, link: Link) -> int:
        """Requests a second."""
        per_write = max(self.block, GRANULE) if "rand" in self.options[0] else self.block
        return max(1, int(self.share * link.bytes_per_s / per_write))


def random_writes(name: str, share: float, block: int, *more: str) -> Profile:
    return Profile(name, share, block, ("--rw=randwrite", *more))


LOADS = (
    random_writes("random 4k, 0.5", 0.5, 4 * KiB),
    random_writes("90 % in 5 %, 4k, 0.5", 0.5, 4 * KiB, "--random_distribution=zoned:90/5:10/95"),
    random_writes("Zipf 1.1, 4k, 1.0", 1.0, 4 * KiB, "--random_distribution=zipf:1.1"),
    Profile("reads alone", 0.5, 4 * KiB, ("--rw=randread",)),
    random_writes("random 4k, 0.2", 0.2, 4 * KiB),
    random_writes("random 4k, 0.7", 0.7, 4 * KiB),
    random_writes("random 16k, 0.4", 0.4, 16 * KiB),
    random_writes("random 64k, 0.4", 0.4, 64 * KiB),
    random_writes("random 256k, 0.4", 0.4, 256 * KiB),
    Profile("sequential 4k, 0.3", 0.3, 4 * KiB, ("--rw=write",)),
    Profile("sequential 64k, 0.5", 0.5, 64 * KiB, ("--rw=write",)),
    Profile("sequential 1M, 0.5", 0.5, MiB, ("--rw=write",)),
    random_writes("Zipf 1.2, 4k, 0.5", 0.5, 4 * KiB, "--random_distribution=zipf:1.2"),
    random_writes("Zipf 0.9, 64k, 0.5", 0.5, 64 * KiB, "--random_distribution=zipf:0.9"),
    random_writes("Pareto 0.2, 4k, 0.5", 0.5, 4 * KiB, "--random_distribution=pareto:0.2"),
    random_writes("99 % in 1 %, 4k, 1.0", 1.0, 4 * KiB, "--random_distribution=zoned:99/1:1/99"),
    random_writes("normal, 4k, 0.5", 0.5, 4 * KiB, "--random_distribution=normal:20"),
    random_writes("bursts, 4k, 0.5", 0.5, 4 * KiB, "--thinktime=1s", "--thinktime_blocks=100"),
    Profile("random 4k, 70 % reads, 0.4", 0.4, 4 * KiB, ("--rw=randrw", "--rwmixread=70")),
    Profile("random 16k, 50 % reads, 0.5", 0.5, 16 * KiB, ("--rw=randrw", "--rwmixread=50")),
)  # fmt: skip

CHOSEN = (
    LOADS[: int(PROFILES)]
    if PROFILES.isdigit()
    else [load for load in LOADS if PROFILES in load.name]
)

hosts = pytest.fixture(two_hosts)


@pytest.fixture(params=LINKS, ids=lambda link: link.name)
def link(request: pytest.FixtureRequest, hosts: Hosts) -> Link:
    found: Link = request.param
    if found.shape:
        hosts[0].run("tc", "qdisc", "add", "dev", LINK, "root", *found.shape)
    return found


def test_predicted_and_actual_ends(link: Link, hosts: Hosts, start: Start, folder: Path) -> None:
    site, far = hosts
    disk = folder / "disk.img"
    noise = random.Random(SEED).randbytes(MiB)
    disk.write_bytes(noise * (link.size // MiB))
    image = make_image(folder / "far.img", link.size)
    target = start(far_server(folder, image, far, link))
    server = start(site.place(Nbdmirror(folder, disk)))
    for profile in CHOSEN:
        rate = profile.rate(link)
        options = (*profile.options, f"--bs={profile.block}", "--iodepth=4", f"--rate_iops={rate}")
        with FioLoad(folder, server.uri(), options) as load:
            time.sleep(1.0)  # fio begins
            said, took_s = one_copy(server, target, link)
            load.stop()
        sys.stdout.write(f"{link.name}; {profile.name}; {rate}/s; {told(said, took_s)}\n")
        sys.stdout.flush()
        if took_s is not None:
            server.qmp.execute("block-job-cancel", device="j")
            server.qmp.wait_completed()
            assert_identical(disk, image)
        else:
            server.qmp.execute("block-job-cancel", device="j", force=True)
            server.qmp.wait_for_event("BLOCK_JOB_CANCELLED", device="j")
        server.qmp.forget()


class DelayedAt(OnTcp):
    def __init__(self, folder: Path, image: Path, host: Host, delay_ms: int) -> None:
        super().__init__(folder, image)
        self.host, self.inside = host, host.inside
        self.options = ["-t", "64", "--filter=delay"]
        self.delay = f"wdelay={delay_ms}ms"

    def argv(self) -> list[str]:
        where = ["-f", "-i", self.host.address, "-p", str(self.port)]
        return ["nbdkit", *where, *self.options, "file", str(self.image), self.delay]

    def uri(self, export: str = "", host: str = "") -> str:
        return super().uri(export, host or self.host.address)

    def is_ready(self) -> bool:
        return answers(self.host, self.uri())


def far_server(folder: Path, image: Path, host: Host, link: Link) -> Server:
    if link.delay_ms:
        return DelayedAt(folder, image, host, link.delay_ms)
    return QemuNbdAt(folder, image, host)


@dataclass(frozen=True)
class Said:
    """What was predicted at a moment of a copy. Seconds."""

    at_s: float
    left_s: float | None
    least_s: float | None
    most_s: float | None
    falls_behind: bool

    def is_within(self, end_s: float) -> bool:
        """Whether the end is in the range that was told, but for SLACK of it."""
        left_s, slack_s = end_s - self.at_s, SLACK * end_s
        is_least = self.least_s is None or self.least_s <= left_s + slack_s
        return is_least and (self.most_s is None or left_s <= self.most_s + slack_s)


def one_copy(server: Nbdmirror, target: Server, link: Link) -> tuple[list[Said], float | None]:
    """What was predicted, and how long the copy took."""
    began_s = time.monotonic()
    server.qmp.start_mirror(target.uri(), speed=link.speed)
    said: list[Said] = []
    while (passed_s := time.monotonic() - began_s) < LONGEST * link.size / link.bytes_per_s + 45:
        (found,) = server.qmp.execute("x-nbdmirror-query-status")["disks"][0]["jobs"]
        if found["ready"]:
            events = [e for e in server.qmp.events if e["event"] == "BLOCK_JOB_READY"]
            at = events[-1]["timestamp"]
            ago_s = time.time() - at["seconds"] - at["microseconds"] / 1e6
            return said, time.monotonic() - ago_s - began_s
        likely, least, most = (found.get(f"left-s{end}") for end in ("", "-min", "-max"))
        said.append(Said(passed_s, likely, least, most, found["falling-behind"]))
        time.sleep(LOOK_S)
    return said, None


def told(said: list[Said], took_s: float | None) -> str:
    """The errors from the middle of the copy on, as parts of the time that it took."""
    behind = sum(one.falls_behind for one in said)
    if took_s is None:
        return f"not READY after {said[-1].at_s:.0f} s; {behind} of {len(said)} looks say so"
    late = [one for one in said if one.at_s >= took_s / 2]
    errors = [(one.at_s + one.left_s - took_s) / took_s for one in late if one.left_s is not None]
    worst = max(errors, key=abs) if errors else 0.0
    text = f"READY after {took_s:.1f} s; error {worst:+.0%} at most"
    unknown, outside = len(late) - len(errors), sum(not one.is_within(took_s) for one in late)
    text += f"; no end predicted in {unknown} of {len(late)} looks" if unknown else ""
    text += f"; not in its range in {outside} of {len(late)} looks" if outside else ""
    return f"{text}; falling behind was said {behind} times" if behind else text
