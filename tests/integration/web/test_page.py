"""The page in a browser, with real servers and mirrors: as it is loaded, and as it changes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.web.webserver import Web
from support.browser import Browser, found
from support.clients import connected
from support.fixtures import Identical, Start
from support.images import KiB, MiB, make_image, make_noise
from support.processes import freeze
from support.servers import NbdkitTarget, Nbdmirror, QemuNbd
from support.waiting import wait_until

LOOKS = "[...document.querySelectorAll('.map rect')].map((bar) => bar.className.baseVal).join(' ')"
"""The kinds of the parts of a map, from left to right."""

SOON_MS = 4000
"""The server is asked more often than that, and a page that is told so is live for long."""

pytestmark = [
    pytest.mark.skipif(not found(), reason="there is no Chromium here: see find_missing in run"),
    pytest.mark.xdist_group("browser"),  # of which there is one
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A page that is closed afterwards, and has had nothing to complain of."""
    chromium.said.clear()
    chromium.asked.clear()
    yield chromium
    chromium.open("about:blank")
    assert chromium.said == []


def opened(browser: Browser, web: Web) -> None:
    browser.open(f"http://127.0.0.1:{web.port}/")
    wait_until(lambda: browser.text("#connection") == "Live", "it is live")


def test_a_mirror_to_its_pivot(
    folder: Path, start: Start, browser: Browser, identical: Identical, disk: Path, target: QemuNbd
) -> None:
    """The page changes by itself."""
    server = start(Nbdmirror(folder, f"vda={disk}"))
    opened(browser, start(Web(folder, server.qmp_path)))
    wait_until(lambda: "Served from " + str(disk) in browser.text(), "the disk is there")
    server.qmp.start_mirror(target.uri(), device="vda")
    server.qmp.wait_ready()
    wait_until(lambda: "Job j: ready" in browser.text("main"), "it is ready")
    assert "To " + target.uri() in browser.text("main")
    assert browser.value("document.querySelector('progress').value") == 100
    wait_until(lambda: "BLOCK_JOB_READY" in browser.text("#events"), "the event is there")
    wait_until(lambda: browser.value("document.querySelector('polyline') !== null"), "it is drawn")
    server.qmp.complete()
    wait_until(lambda: "Served from " + target.uri() in browser.text("main"), "the pivot is there")
    assert "Last job j: completed" in browser.text("main")
    wait_until(lambda: "X_NBDMIRROR_PIVOTED" in browser.text("#events"), "the event is there")
    identical(disk, target.image)


def test_a_lost_target_and_its_return(
    folder: Path, start: Start, browser: Browser, identical: Identical, disk: Path, target: QemuNbd
) -> None:
    server = start(Nbdmirror(folder, disk))
    server.allowed.append("lost|connection")
    opened(browser, start(Web(folder, server.qmp_path)))
    server.qmp.start_mirror(target.uri(), x_nbdmirror_reconnect_delay=60)
    server.qmp.wait_ready()
    target.kill()
    wait_until(lambda: "the target has been lost for" in browser.text("main"), "it is lost")
    assert browser.value("document.querySelector('.state').className") == "state bad"
    target.start()
    wait_until(lambda: "X_NBDMIRROR_TARGET_BACK" in browser.text("#events"), "it is back")
    wait_until(lambda: "has been lost" not in browser.text("main"), "it is well again")
    server.qmp.complete()
    identical(disk, target.image)


def test_the_map_of_a_disk_moves(
    folder: Path, start: Start, browser: Browser, identical: Identical, target: QemuNbd
) -> None:
    """A guest's writes appear where they are, also in the words for who cannot see them. Without
    JavaScript the picture is the one of when the page was loaded."""
    disk = make_noise(folder / "half.img", MiB)
    os.truncate(disk, target.image.stat().st_size)
    server = start(Nbdmirror(folder, disk))
    web = start(Web(folder, server.qmp_path))
    opened(browser, web)
    server.qmp.start_mirror(target.uri(), speed=1, buf_size=64 * KiB)  # one piece, then nothing

    def looks() -> list[str]:
        return str(browser.value(LOOKS)).split()

    wait_until(lambda: looks()[:1] == ["not-flushed"], "the beginning was sent")
    wait_until(lambda: looks()[-1:] == ["dirty"], "the end was not")
    server.qmp.execute("job-pause", id="j")
    server.qmp.wait_status("paused")
    words = "document.querySelector('.map svg').getAttribute('aria-label')"
    wait_until(lambda: " 0 B in flight" in str(browser.value(words)), "the words are of now")
    assert str(browser.value(words)).partition(", ")[2] == browser.text(".map .top")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(f"http://127.0.0.1:{web.port}/")
        before = browser.text(".map .top")
        assert "dirty" in before
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    server.qmp.execute("job-resume", id="j")
    server.qmp.execute("block-job-set-speed", device="j", speed=0)
    server.qmp.wait_ready()
    opened(browser, web)
    wait_until(lambda: looks() == ["clean", "zeroes"], "all is there")
    server.qmp.execute("job-pause", id="j")
    server.qmp.wait_status("standby")
    with connected(server.uri()) as guest:
        guest.pwrite(b"x" * 512, disk.stat().st_size - 512)
    wait_until(lambda: looks() == ["clean", "zeroes", "dirty"], "the guest's write is there")
    assert "64 KiB dirty" in browser.text(".map .top")
    server.qmp.execute("job-resume", id="j")
    server.qmp.complete()
    wait_until(lambda: looks() == [], "there is no job, and no map")
    identical(disk, target.image)


def test_a_job_that_stops_at_an_error(
    folder: Path, start: Start, browser: Browser, disk: Path
) -> None:
    parameters = (str(disk.stat().st_size), "error-pwrite=ENOSPC", "error-pwrite-rate=100%")
    broken = start(NbdkitTarget(folder, "memory", *parameters, filters=("error",)))
    server = start(Nbdmirror(folder, disk))
    opened(browser, start(Web(folder, server.qmp_path)))
    server.qmp.start_mirror(broken.uri(), on_target_error="stop")
    wait_until(lambda: "I/O error (nospace)" in browser.text("main"), "the error is there")
    wait_until(lambda: "Job j: paused" in browser.text("main"), "it is paused")
    server.qmp.execute("job-cancel", id="j")
    wait_until(lambda: "Last job j: cancelled" in browser.text("main"), "its end is there")


def test_three_servers_and_their_process(folder: Path, start: Start, browser: Browser) -> None:
    """One hangs, one ends; then the process that shows them is started again."""
    place = folder / "sockets"
    place.mkdir()
    servers = {}
    for name in "abc":
        server = Nbdmirror(folder, f"{name}={make_image(folder / f'{name}.img', MiB)}")
        server.qmp_path = place / f"{name}.qmp"
        servers[name] = start(server)
    web = start(Web(folder, place))
    opened(browser, web)

    def shown() -> str:
        return " ".join(browser.text("main").split())

    wait_until(lambda: all(f"/{name}.img" in shown() for name in "abc"), "all are there")
    freeze(servers["b"].pid)
    servers["c"].stop()
    wait_until(lambda: "b.qmp no answer within 5 s" in shown(), "one does not answer")
    assert "c.qmp" not in shown() and "/a.img" in shown()
    os.kill(servers["b"].pid, signal.SIGCONT)
    wait_until(lambda: "/b.img" in shown(), "it is back")
    web.stop()
    wait_until(lambda: "Not live" in browser.text("#connection"), "the page knows")
    assert browser.value("document.body.className") == "stale"
    web.start()
    wait_until(lambda: browser.text("#connection") == "Live", "it goes on by itself")
    assert browser.value("document.body.className") == ""
    browser.said[:] = [text for text in browser.said if "net::ERR_" not in text]


def test_a_server_that_says_nothing_is_noticed(
    folder: Path, start: Start, browser: Browser, disk: Path
) -> None:
    """No error comes of that: the process hangs, or the network is gone without a word."""
    web = start(Web(folder, start(Nbdmirror(folder, f"vda={disk}")).qmp_path))
    opened(browser, web)
    wait_until(lambda: "Served from " + str(disk) in browser.text("main"), "the disk is there")
    browser.value(f"document.body.dataset.silentMs = {SOON_MS}")
    freeze(web.pid)
    try:
        wait_until(lambda: "nothing is heard" in browser.text("#connection"), "it is noticed")
        assert browser.value("document.body.className") == "stale"
    finally:
        os.kill(web.pid, signal.SIGCONT)
    wait_until(lambda: browser.text("#connection") == "Live", "it goes on by itself")
    assert browser.value("document.body.className") == ""


def test_on_every_screen(folder: Path, start: Start, browser: Browser) -> None:
    """From a telephone on; in the colours that its user prefers. All is there with JavaScript
    switched off, and no other address is asked."""
    long = folder / ("a-disk-with-a-long-name" * 8)
    server = start(Nbdmirror(folder, make_image(long, MiB)))
    target = start(QemuNbd(folder, make_noise(folder / "target.img", MiB)))
    server.qmp.start_mirror(target.uri())
    server.qmp.wait_ready()
    web = start(Web(folder, server.qmp_path))
    colours = set()
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        for width in (320, 375, 768, 1920):
            browser.size(width)
            opened(browser, web)
            wait_until(lambda: "Job j: ready" in browser.text("main"), "it is there")
            assert browser.value("document.documentElement.scrollWidth") <= width
        colours.add(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
    assert {url.split("/")[2] for url in browser.asked if url.startswith("http")} == {
        f"127.0.0.1:{web.port}"
    }
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(f"http://127.0.0.1:{web.port}/")
        assert "Job j: ready" in browser.text("main")
        assert "Without JavaScript" in browser.text("#connection")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_text_that_is_selected_stays(folder: Path, start: Start, browser: Browser) -> None:
    server = start(Nbdmirror(folder, f"vda={make_image(folder / 'a.img', MiB)}"))
    target = start(QemuNbd(folder, make_noise(folder / "target.img", MiB)))
    web = start(Web(folder, server.qmp_path))
    opened(browser, web)
    wait_until(lambda: "Served from" in browser.text("main"), "the disk is there")
    browser.value("getSelection().selectAllChildren(document.querySelector('article .path'))")
    server.qmp.start_mirror(target.uri(), device="vda")
    server.qmp.wait_ready()
    wait_until(lambda: "BLOCK_JOB_READY" in browser.text("#events"), "the news is there")
    assert browser.value("getSelection().toString()") == str(folder / "a.img")
    wait_until(lambda: browser.text("#connection") == "Not live: text is selected", "it is said")
    assert browser.value("document.body.className") == "stale"
    wait_until(lambda: "ready" in str(browser.value("held")), "what is held back is of now")
    freeze(web.pid)  # nothing else comes
    browser.value("getSelection().removeAllRanges()")
    wait_until(lambda: "ready" in browser.text("main"), "what was held back is there")
    assert (browser.text("#connection"), browser.value("document.body.className")) == ("Live", "")
    os.kill(web.pid, signal.SIGCONT)
