"""The systemd unit on a host that is booted with systemd: a killed server, the order of the host's
start and end, and what is there after a power cut."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from e2e.booted import Booted, booted
from support.clients import connected
from support.fixtures import Identical
from support.guests import Guest
from support.images import MiB, make_empty, make_image, make_noise
from support.waiting import wait_until

SIZE = 16 * MiB
JOURNAL_SIZE = 64 * MiB
STORAGE = """
[Service]
User=nbdmirror
RuntimeDirectory={name}
{more}
ExecStart={command} /srv/test/{image}
[Install]
WantedBy=multi-user.target
"""
CLIENT = """
[Unit]
{order}
[Service]
Type=oneshot
RemainAfterExit=yes
Environment=DISK=nbd+unix:///?socket=/run/nbdmirror/vm1/nbd
ExecStart=/usr/bin/python3 /srv/test/client.py {at} start
ExecStop=/usr/bin/python3 /srv/test/client.py {at} end
[Install]
WantedBy=multi-user.target
"""
WRITE = """
import os, sys, nbd
handle = nbd.NBD()
handle.connect_uri(os.environ["DISK"])
handle.pwrite(sys.argv[2].encode().ljust(512, b"."), int(sys.argv[1]))
handle.flush()
handle.shutdown()
"""


@pytest.fixture
def host(folder: Path) -> Iterator[Booted]:
    """With nbdmirror installed as docs/systemd.md says, and no disk in its configuration yet."""
    folder.chmod(0o755)
    for host in booted(folder):
        host.run(
            "systemd-sysusers /opt/checkout/packaging/systemd/sysusers.conf"
            " && cp /opt/checkout/packaging/systemd/nbdmirror@.service /etc/systemd/system/"
            " && mkdir -p /etc/nbdmirror"
        )
        yield host


def configure(host: Booted, disks: str, name: str = "vm1", *, options: str = "") -> None:
    text = f"DISKS='{disks}'\nOPTIONS='{options}'\n"
    host.run(f"cat >/etc/nbdmirror/{name}.conf <<'END'\n{text}END")


def add_unit(host: Booted, name: str, text: str) -> None:
    (host.folder / "units" / f"{name}.service").write_text(text)
    host.run("systemctl daemon-reload")


def storage(name: str, more: str = "") -> str:
    """A unit with a qemu-nbd of NAME.img."""
    command = f"qemu-nbd -f raw -t -e 9 -k /run/{name}/nbd"
    return STORAGE.format(name=name, more=more, command=command, image=f"{name}.img")


def add_storage(host: Booted, name: str) -> str:
    """Its URI in there."""
    add_unit(host, name, storage(name))
    return f"nbd+unix:///?socket=/run/{name}/nbd"


def add_lender(host: Booted, name: str, image: str) -> str:
    """A server that takes no locks. Returns its URI in there."""
    command = f"nbdkit -f -U /run/{name}/nbd file"
    add_unit(host, name, STORAGE.format(name=name, more="", command=command, image=image))
    host.run(f"systemctl start {name}")
    return f"nbd+unix:///?socket=/run/{name}/nbd"


def give(host: Booted, *names: str) -> None:
    host.run(f"cd /srv/test && chown nbdmirror: {' '.join(names)}")


def uri_of(host: Booted) -> str:
    return f"nbd+unix:///?socket={host.path('/run/nbdmirror/vm1/nbd')}"


def show(host: Booted, name: str) -> str:
    return host.run(f"systemctl show --value -p {name} nbdmirror@vm1")


def has_restarted(host: Booted, times: int) -> bool:
    return show(host, "NRestarts") == str(times)


def is_served(host: Booted) -> bool:
    return show(host, "ActiveState") == "active"


def test_a_killed_server_is_back_and_its_mirror_goes_on(
    host: Booted, folder: Path, identical: Identical
) -> None:
    disk = make_image(folder / "disk.img", SIZE)
    target = make_noise(folder / "target.img", SIZE)
    give(host, "disk.img", "target.img")
    uri = add_storage(host, "target")
    configure(host, "vda=/srv/test/disk.img")
    host.run("systemctl start target && systemctl enable --now nbdmirror@vm1")
    cli = "NBDMIRROR_QMP=/run/nbdmirror/vm1/qmp nbdmirror"
    host.run(f"{cli} mirror '{uri}' --reconnect-delay 20 --wait ready --timeout 30")
    known = bytearray(disk.read_bytes())
    for times in (1, 2, 3):
        with Guest(uri_of(host), known, seed=times) as guest:
            guest.wait_for_requests(50)
        host.kill(int(show(host, "MainPID")))
        killed_s = time.monotonic()
        wait_until(partial(has_restarted, host, times), "it is started again")
        wait_until(lambda: is_served(host), "it serves again")
        with connected(uri_of(host)) as handle:
            assert handle.pread(512, 0) == guest.model[:512]
        sys.stdout.write(f"served again after {time.monotonic() - killed_s:.2f} s\n")
        known = guest.model
    host.run(f"{cli} wait --ready --timeout 30")
    with Guest(uri_of(host), known) as guest:
        guest.wait_for_requests(20)
        host.run(f"{cli} complete --timeout 30")
        guest.wait_for_requests(20)
    host.run("systemctl stop nbdmirror@vm1 && systemctl stop target")
    identical(guest, target)


def test_two_units_see_each_other(host: Booted, folder: Path, identical: Identical) -> None:
    """What one of them writes to is no target of the other one, by whatever way. And each knows
    the boot, without which it would not know its disk's file again."""
    disk = make_image(folder / "disk.img", SIZE)
    target = make_noise(folder / "target.img", SIZE)
    make_image(folder / "second.img", SIZE)
    give(host, "disk.img", "second.img", "target.img")
    uri = add_storage(host, "target")
    again, of_disk = (add_lender(host, f"of-{name}", f"{name}.img") for name in ("target", "disk"))
    configure(host, "vda=/srv/test/disk.img")
    configure(host, "vdb=/srv/test/second.img", "vm2")
    host.run("systemctl start target nbdmirror@vm1 nbdmirror@vm2")
    one, other = (f"NBDMIRROR_QMP=/run/nbdmirror/{name}/qmp nbdmirror" for name in ("vm1", "vm2"))
    host.run(f"{one} mirror '{uri}' --wait ready --timeout 30")
    user = f"is in use by process {show(host, 'MainPID')}, another nbdmirror"
    for way in (uri, again, of_disk):
        assert user in host.run(f"{other} mirror '{way}'", check=False), way
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert f'"{boot}"' in host.run("cat /var/lib/nbdmirror/vm1/vda.json")
    host.run(f"{one} complete --timeout 30")
    host.run("systemctl stop nbdmirror@vm1 nbdmirror@vm2 of-target of-disk target")
    identical(disk, target)


def test_the_page_of_a_hosts_servers(host: Booted, folder: Path) -> None:
    """As the user of the servers, from before the first of them starts. One that was killed, and
    cannot be started again, is missed; one that ends in order is not."""
    make_image(folder / "disk.img", SIZE)
    give(host, "disk.img")
    configure(host, "vda=/srv/test/disk.img")
    host.run("cp /opt/checkout/packaging/systemd/nbdmirror-web.service /etc/systemd/system/")
    host.run("systemctl daemon-reload && ip link set lo up && systemctl start nbdmirror-web")
    ask = (
        "import urllib.request; print(urllib.request.urlopen"
        "('http://localhost:10810/status', timeout=10).read().decode())"
    )

    def answers() -> str:
        return host.run(f'python3 -c "{ask}" 2>/dev/null || :')

    wait_until(lambda: "[]" in answers(), "it answers")
    host.run("systemctl start nbdmirror@vm1")
    wait_until(lambda: "/srv/test/disk.img" in answers(), "the server is there")
    few = "/etc/systemd/system/nbdmirror@vm1.service.d"  # 30 starts take a busy machine too long
    host.run(f"mkdir {few} && printf '[Unit]\\nStartLimitBurst=3\\n' >{few}/few.conf")
    host.run("systemctl daemon-reload")
    configure(host, "vda=/srv/test/disk.img", options="--no-such-option")
    host.kill(int(show(host, "MainPID")))
    wait_until(lambda: show(host, "ActiveState") == "failed", "systemd has given up")
    wait_until(lambda: "Connection refused" in answers(), "the server is missed")
    configure(host, "vda=/srv/test/disk.img")
    host.run("systemctl reset-failed nbdmirror@vm1 && systemctl start nbdmirror@vm1")
    wait_until(lambda: "/srv/test/disk.img" in answers(), "the server is back")
    host.run("systemctl stop nbdmirror@vm1")
    wait_until(lambda: "[]" in answers(), "the server is there no more")
    host.run("systemctl stop nbdmirror-web")
    assert host.run("systemctl show --value -p Result nbdmirror-web") == "success"


def test_an_image_becomes_the_points(host: Booted, folder: Path, identical: Identical) -> None:
    """From before there is anything on the far side, over a kill, until the mirror's end."""
    disk = make_image(folder / "disk.img", SIZE)
    image = make_noise(folder / "image.img", SIZE)
    make_empty(folder / "journal.img", JOURNAL_SIZE)
    give(host, "disk.img", "image.img", "journal.img")
    unit = "nbdmirror-apply@vm1"
    host.run("cp /opt/checkout/packaging/systemd/nbdmirror-apply@.service /etc/systemd/system/")
    uri, journal = (add_storage(host, name) for name in ("image", "journal"))
    host.run(f"printf 'IMAGE={uri}\\nJOURNAL={journal}\\n' >/etc/nbdmirror/vm1.apply")
    host.run(f"systemctl start {unit}")

    def has(name: str, value: str) -> bool:
        return host.run(f"systemctl show --value -p {name} {unit}") == value

    def follows(times: int) -> bool:
        said = host.run(f"journalctl --no-pager -o cat -u {unit}")
        return said.count("follows the source") == times

    wait_until(lambda: has("ActiveState", "activating"), "it waits for its journal")
    configure(host, "vda=/srv/test/disk.img")
    host.run("systemctl start image journal nbdmirror@vm1")
    cli = "NBDMIRROR_QMP=/run/nbdmirror/vm1/qmp nbdmirror"
    points = f"--journal '{journal}' --every 200ms --wait ready --timeout 30"
    host.run(f"{cli} mirror '{uri}' {points}")
    with Guest(uri_of(host), disk, pause_s=0.01) as guest:
        wait_until(lambda: follows(1), "the image follows")
        host.kill(int(host.run(f"systemctl show --value -p MainPID {unit}")))
        wait_until(lambda: follows(2), "the image follows again")
        host.run(f"{cli} complete --timeout 30")
        guest.wait_for_requests(20)
    wait_until(lambda: has("ActiveState", "inactive"), "it has ended, too")
    assert has("Result", "success")
    host.run("systemctl stop nbdmirror@vm1 image journal")
    identical(guest, image)


def test_guests_and_libvirts_guests_have_their_disk_until_they_have_ended(
    host: Booted, folder: Path, identical: Identical
) -> None:
    """Both write at their start and at their end: the unit of its own that the documents describe,
    and libvirt-guests, which the unit is ordered before by itself."""
    disk = make_image(folder / "disk.img", SIZE)
    known = bytearray(disk.read_bytes())
    (folder / "client.py").write_text(WRITE)
    give(host, "disk.img")
    configure(host, "vda=/srv/test/disk.img")
    own = "Wants=nbdmirror@vm1.service\nAfter=nbdmirror@vm1.service"
    add_unit(host, "guest", CLIENT.format(order=own, at=0))
    add_unit(host, "libvirt-guests", CLIENT.format(order="", at=4096))
    host.run("systemctl enable nbdmirror@vm1 guest libvirt-guests")
    host.power_off()  # without any of them started
    assert disk.read_bytes() == known
    host.start()
    for at in (0, 4096):
        assert disk.read_bytes()[at : at + 6] == b"start."
    host.power_off()
    for at in (0, 4096):
        known[at : at + 512] = b"end".ljust(512, b".")
    identical(disk, bytes(known))


def test_a_site_that_comes_up_in_any_order_after_a_power_cut(
    host: Booted, folder: Path, identical: Identical
) -> None:
    """The disk is on an NBD server, which starts only when ours has said that it waits for it; the
    mirror of before the cut goes on, and its target is as late."""
    disk = make_image(folder / "disk.img", SIZE)
    target = make_noise(folder / "target.img", SIZE)
    give(host, "disk.img", "target.img")
    source_uri, target_uri = add_storage(host, "disk"), add_storage(host, "target")
    configure(host, f"vda={source_uri}")
    host.run("systemctl enable --now disk target && systemctl enable --now nbdmirror@vm1")
    cli = "NBDMIRROR_QMP=/run/nbdmirror/vm1/qmp nbdmirror"
    host.run(f"{cli} mirror '{target_uri}' --reconnect-delay 60 --wait ready --timeout 30")
    with Guest(uri_of(host), disk) as guest:
        guest.wait_for_requests(50)
    host.cut_power()
    look = "systemctl show -p StatusText,ActiveState nbdmirror@vm1"
    pattern = "-e waiting -e State=active"
    # As root, who needs no D-Bus for that, which is not on every system.
    waits = f"ExecStartPre=+sh -c 'until {look} | grep -q {pattern}; do sleep 0.1; done'"
    for name in ("disk", "target"):
        (folder / "units" / f"{name}.service").write_text(storage(name, waits))
    host.start()
    wait_until(lambda: is_served(host), "the disk is served")
    host.run(f"{cli} wait --ready --timeout 30")
    with Guest(uri_of(host), guest.model) as guest:
        guest.wait_for_requests(20)
        host.run(f"{cli} complete --timeout 30")
        guest.wait_for_requests(20)
    host.run("systemctl stop nbdmirror@vm1 && systemctl stop target disk")
    identical(guest, target)
