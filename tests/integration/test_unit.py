"""The systemd unit: systemd-analyze has nothing to say against it, and the server can live with
what it forbids."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from support.fixtures import Start
from support.guests import Guest
from support.images import MiB, assert_identical, make_image, make_noise
from support.processes import ROOT, run
from support.servers import Nbdmirror, QemuNbd
from support.waiting import STOP_S_MAX

from nbdmirror.cli.main import build_parser
from nbdmirror.cli.serve import serve_command

UNIT = ROOT / "packaging" / "systemd" / "nbdmirror@.service"
WEB_UNIT = UNIT.parent / "nbdmirror-web.service"
APPLY_UNIT = UNIT.parent / "nbdmirror-apply@.service"
EXAMPLE = UNIT.parent / "example.conf"
EXPOSURE_MAX = {UNIT: 1.6, WEB_UNIT: 0.9, APPLY_UNIT: 1.3}
"""systemd 252. Newer versions may count more or less; then these figures, and those of
docs/systemd.md, are to be looked at again."""
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1


def settings(text: str) -> dict[str, list[str]]:
    """What is on the right of each `NAME=` of a unit."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, flags=re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def faults_of(unit: Path) -> list[str]:
    """What is said of the units of this system, which are read too, is theirs."""
    done = run("systemd-analyze", "verify", "--man=no", unit)
    said = (done.stdout + done.stderr).splitlines()
    return [line for line in said if not line.startswith("/usr/lib/systemd/")]


@pytest.mark.parametrize(
    ("original", "name"),
    [(UNIT, "nbdmirror@vm1"), (WEB_UNIT, WEB_UNIT.stem), (APPLY_UNIT, "nbdmirror-apply@vm1")],
)
def test_systemd_finds_no_fault(tmp_path: Path, original: Path, name: str) -> None:
    """The command is looked for: there it is where pip puts it."""
    command = Path(sys.executable).parent / "nbdmirror"
    text = original.read_text()
    assert text.count("ExecStart=nbdmirror ") == 1
    unit = tmp_path / f"{name}.service"
    unit.write_text(text.replace("ExecStart=nbdmirror ", f"ExecStart={command} "))
    assert faults_of(unit) == []
    # It would have found one.
    unit.write_text(text.replace("ExecStart=nbdmirror ", "ExecStart=/nonexistent/nbdmirror "))
    assert run("systemd-analyze", "verify", "--man=no", unit, check=False).returncode != 0
    unit.write_text(text.replace("ProtectHome=", "ProtectHouse="))
    assert "ProtectHouse" in run("systemd-analyze", "verify", "--man=no", unit, check=False).stderr


def test_systemd_finds_no_fault_with_the_drop_in_of_the_docs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "systemd.md").read_text()
    (drop_in,) = re.findall(r"^```ini\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert settings(drop_in)["User"] == ["root"]
    unit = tmp_path / "nbdmirror@vm1.service"
    command = Path(sys.executable).parent / "nbdmirror"
    unit.write_text(UNIT.read_text().replace("ExecStart=nbdmirror ", f"ExecStart={command} "))
    folder = tmp_path / "nbdmirror@vm1.service.d"
    folder.mkdir()
    (folder / "override.conf").write_text(drop_in)
    assert faults_of(unit) == []
    (folder / "override.conf").write_text(drop_in.replace("SystemCallFilter=", "CallFilter="))
    assert "CallFilter" in run("systemd-analyze", "verify", "--man=no", unit, check=False).stderr


# The order of a host's start, which at its end is the other way round. A file system on a disk of
# ours, by the kernel's client; one that our images are on; and libvirt with a guest.
AROUND = {
    "nbdclient.service": """[Unit]
Wants=nbdmirror@vm1.service
After=nbdmirror@vm1.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
""",
    "mnt.mount": """[Unit]
Requires=nbdclient.service
After=nbdclient.service remote-fs-pre.target network-online.target
Before=remote-fs.target
[Mount]
What=/dev/nbd0
Where=/mnt
Options=_netdev
""",
    "images.mount": """[Unit]
After=remote-fs-pre.target network-online.target
Before=remote-fs.target
[Mount]
What=storage:/images
Where=/images
Type=nfs
""",
    "remote-fs.target": """[Unit]
Wants=mnt.mount images.mount
After=remote-fs-pre.target
""",
    "libvirtd.service": """[Unit]
After=remote-fs.target network.target
Before=libvirt-guests.service
[Service]
ExecStart=/bin/true
""",
    "libvirt-guests.service": """[Unit]
Wants=libvirtd.service
After=network.target libvirtd.service virt-guest-shutdown.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
""",
    "virt-guest-shutdown.target": "[Unit]\nDescription=guests have been shut down\n",
    "nbdmirror@vm1.service.d/images.conf": "[Unit]\nRequiresMountsFor=/images\n",
}


def circles(folder: Path, unit: str, drop_in: str = "") -> str:
    """What systemd says of circles in the order of `unit` and all around it."""
    folder.mkdir()
    text = re.sub("^ExecStart(Post)?=.*", "ExecStart\\1=/bin/true", unit, flags=re.MULTILINE)
    files = {**AROUND, "nbdmirror@.service": text}
    if drop_in:
        files["nbdmirror@vm1.service.d/more.conf"] = drop_in
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    units = [name for name in files if "/" not in name and "@." not in name]
    done = run(
        *("env", f"SYSTEMD_UNIT_PATH={folder}:", "systemd-analyze", "verify", "--man=no"),
        *(*units, "nbdmirror@vm1.service", "multi-user.target"),
        check=False,
    )
    return "\n".join(line for line in done.stderr.splitlines() if "cycle" in line)


def test_mounts_guests_and_disks_start_and_end_in_an_order(tmp_path: Path) -> None:
    unit = UNIT.read_text()
    assert circles(tmp_path / "units", unit) == ""
    # It would have found one.
    assert "cycle" in circles(tmp_path / "circle", unit, "[Unit]\nAfter=remote-fs.target\n")


def test_guests_start_after_their_disks_and_end_before_them() -> None:
    before = " ".join(settings(UNIT.read_text())["Before"]).split()
    guests = ["libvirtd.service", "virtqemud.service"]  # whichever the system has
    ends = ["libvirt-guests.service", "virt-guest-shutdown.target", "remote-fs.target"]
    assert sorted(before) == sorted([*guests, *ends])


@pytest.mark.parametrize("unit", EXPOSURE_MAX)
def test_little_is_exposed(unit: Path) -> None:
    most = EXPOSURE_MAX[unit]
    threshold = f"--threshold={round(most * 10)}"
    done = run("systemd-analyze", "security", "--offline=true", threshold, "--no-pager", unit)
    assert re.search(rf"exposure level for \S+: {most} ", done.stdout), done.stdout
    text = {
        UNIT: "the unit {} of 10",
        WEB_UNIT: "`nbdmirror-web.service` {} of 10",
        APPLY_UNIT: "`nbdmirror-apply@.service` {} of 10",
    }[unit]
    assert text.format(most) in " ".join((ROOT / "docs" / "systemd.md").read_text().split())


def test_the_web_is_for_this_machine_alone() -> None:
    """By its command, and by what systemd lets through."""
    unit = settings(WEB_UNIT.read_text())
    args = build_parser().parse_args(unit["ExecStart"][0].split()[1:])
    assert (args.command, args.sockets) == ("web", ["/run/nbdmirror/"])
    assert args.listen[0] == "127.0.0.1"
    assert (unit["IPAddressDeny"], unit["IPAddressAllow"]) == (["any"], ["localhost"])
    assert unit["User"] == settings(UNIT.read_text())["User"]


def test_the_applier_is_asked_for_what_its_file_says() -> None:
    """As systemd puts it in: each variable is one word, whatever is in it."""
    unit = settings(APPLY_UNIT.read_text())
    said = dict(re.findall(r"^#     (\w+)=(\S+)$", APPLY_UNIT.read_text(), flags=re.MULTILINE))
    words = [
        said[word[2:-1]] if word.startswith("${") else word for word in unit["ExecStart"][0].split()
    ]
    args = build_parser().parse_args(words[1:])
    assert (args.command, args.image, args.journal) == ("apply", said["IMAGE"], said["JOURNAL"])
    assert unit["EnvironmentFile"] == ["/etc/nbdmirror/%i.apply"]
    assert unit["User"] == settings(UNIT.read_text())["User"]


def test_its_command_line_is_what_serve_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the example's variables, commented out ones as well, put in as systemd does."""
    unit = settings(UNIT.read_text())
    example = re.sub(r"^#(?=[A-Z_]+=)", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    for commented_out in ("", example):
        lines = [*unit["Environment"], *f"{EXAMPLE.read_text()}\n{commented_out}".splitlines()]
        variables = dict(
            shlex.split(line)[0].split("=", 1)
            for line in lines
            if line and not line.startswith("#")
        )
        words: list[str] = []
        for word in unit["ExecStart"][0].split():
            if word.startswith("$"):
                words += shlex.split(variables.get(word[1:], ""))
            else:
                words.append(word)
        monkeypatch.setenv("NBDMIRROR_QMP", variables["NBDMIRROR_QMP"])
        assert words[:2] == ["nbdmirror", "serve"]
        args = build_parser().parse_args(words[1:])
        args.nbdkit_args = []
        argv, _ = serve_command(args, {})
        assert "-f" in argv  # systemd is to see it end
        assert "qmp=/run/nbdmirror/%i/qmp" in argv
        assert "state-dir=/var/lib/nbdmirror/%i" in argv
        assert f"open-timeout={900 if commented_out else 120}" in argv
        assert unit["StateDirectory"] == ["nbdmirror/%i"]
        assert "file=system=/var/lib/nbdmirror/images/system.img" in argv
        assert ("/run/nbdmirror/%i/nbd" in argv) is not bool(commented_out)


def test_every_system_call_is_allowed(folder: Path, start: Start) -> None:
    """Of a life with a guest, a mirror and a pivot, on the list of systemd-analyze."""
    trace = folder / "trace"

    class Traced(Nbdmirror):
        def argv(self) -> list[str]:
            return ["strace", "-f", "-qq", "-o", str(trace), *super().argv()]

        def stop(self) -> None:
            """strace waits for its child and ends with its exit status."""
            if self.process is not None:
                os.kill(int(trace.read_text().split(maxsplit=1)[0]), signal.SIGTERM)
                self.process.wait(STOP_S_MAX)
            super().stop()

    disk = make_image(folder / "disk.img", 2 * MiB)
    target = start(QemuNbd(folder, make_noise(folder / "target.img", 2 * MiB)))
    server = Traced(folder, disk, options=("--state-dir", str(folder / "state")))
    with server:
        with Guest(server.uri(), disk) as guest:
            guest.wait_for_requests(100)
            server.qmp.start_mirror(target.uri())
            server.qmp.wait_ready()
            server.qmp.complete()
            guest.wait_for_requests(50)
        assert_identical(guest.model, server.uri())
    called = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), flags=re.MULTILINE))
    assert {"pwrite64", "accept4", "fallocate"} <= called
    allowed: set[str] = set()
    for setting in settings(UNIT.read_text())["SystemCallFilter"]:
        names = setting.strip("~").split()
        taken = set().union(
            *(system_calls(name) if name.startswith("@") else {name} for name in names)
        )
        allowed = allowed - taken if setting.startswith("~") else allowed | taken
    if os.geteuid() == 0:
        called -= {"fchown"}  # root alone gives what it makes to others, and the unit is not root
    called |= {"sched_setaffinity"}  # for guests with more requests than this one
    forbidden = called - allowed
    assert not forbidden


def system_calls(group: str) -> set[str]:
    found: set[str] = set()
    for line in run("systemd-analyze", "syscall-filter", group).stdout.splitlines()[1:]:
        name = line.strip()
        if name.startswith("@"):
            found |= system_calls(name)
        elif name and not name.startswith("#"):
            found.add(name)
    return found


def test_it_needs_no_memory_that_is_written_and_run(folder: Path, start: Start) -> None:
    """MemoryDenyWriteExecute=yes, as the kernel has it."""
    libc = ctypes.CDLL(None, use_errno=True)
    get = libc.prctl(PR_SET_MDWE + 1, 0, 0, 0, 0)
    if get < 0 and ctypes.get_errno() == errno.EINVAL:
        pytest.skip("this kernel has no PR_SET_MDWE (6.3 and later have)")
    deny = (
        "import ctypes, os, sys\n"
        f"assert ctypes.CDLL(None).prctl({PR_SET_MDWE}, {PR_MDWE_REFUSE_EXEC_GAIN}, 0, 0, 0) == 0\n"
        "os.execvp(sys.argv[1], sys.argv[1:])\n"
    )

    class Denied(Nbdmirror):
        def argv(self) -> list[str]:
            return [sys.executable, "-c", deny, *super().argv()]

    disk = make_image(folder / "disk.img", MiB)
    target = start(QemuNbd(folder, make_noise(folder / "target.img", MiB)))
    server = start(Denied(folder, disk, options=("--state-dir", str(folder / "state"))))
    with Guest(server.uri(), disk) as guest:
        server.qmp.start_mirror(target.uri(), copy_mode="write-blocking")
        server.qmp.wait_ready()
        server.qmp.complete()
        guest.wait_for_requests(50)
    assert_identical(guest.model, target.uri())
