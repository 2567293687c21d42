"""A target that was lost and comes back as another one is not written to (rule 40)."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.clients import connected
from support.fixtures import Start
from support.images import MiB, make_image, make_noise
from support.servers import Nbdmirror, QemuNbd

SIZE = 4 * MiB


@pytest.mark.rule(40)
@pytest.mark.guarantee("A target that was lost and came back")
def test_a_target_that_comes_back_changed_is_not_written_to(start: Start, folder: Path) -> None:
    disk = make_image(folder / "disk.img", SIZE)
    image = make_noise(folder / "target.img", SIZE)
    target = QemuNbd(folder, image)
    target.start()
    server = start(Nbdmirror(folder, f"src={disk}", bare=True))
    qmp = server.qmp
    qmp.add_target("tgt", target)
    qmp.start_mirror("tgt", device="src", on_target_error="stop")
    qmp.wait_ready()
    target.kill()
    with connected(server.uri("src")) as guest:
        guest.pwrite(b"\x5a" * 4096, 8192)
    qmp.wait_status("standby")
    other = make_noise(image, SIZE + MiB, seed=7).read_bytes()
    target.socket.unlink(missing_ok=True)
    target.start()
    qmp.forget()
    qmp.execute("block-job-resume", device="j")
    qmp.wait_for_event("BLOCK_JOB_ERROR")
    qmp.wait_status("standby")
    assert image.read_bytes() == other
    qmp.execute("job-cancel", id="j")
    qmp.wait_for_event("BLOCK_JOB_CANCELLED")
    target.kill()
    assert image.read_bytes() == other
    assert disk.read_bytes()[8192:12288] == b"\x5a" * 4096
