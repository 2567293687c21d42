"""All actions of a transaction are of one moment, as in QEMU, where no guest writes meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from nbdmirror.devices.base import MemoryDevice
from nbdmirror.disk.disk import Disk
from nbdmirror.qmp.command import Action
from nbdmirror.qmp.transaction import _ACTIONS, _Step, _transact
from nbdmirror.server.bitmaps import Bitmaps, Change, Place
from nbdmirror.state.null_store import NullStore

SIZE, GRANULE = 1 << 20, 4096


def test_a_guest_that_writes_between_two_actions() -> None:
    disk = Disk("vda", MemoryDevice(SIZE))
    bitmaps = Bitmaps({disk: NullStore()})
    nodes = SimpleNamespace(mirror_to=lambda node: None, find_disk=lambda node: disk)
    server: Any = SimpleNamespace(bitmaps=bitmaps, nodes=nodes)
    for name in ("a", "b"):
        options: dict[str, Any] = {"persistent": False, "disabled": name == "b"}
        bitmaps.add(Place(disk), name, GRANULE, **options).commit()

    def write(_: Any) -> Change:
        return Change(lambda: None, lambda: disk.pwrite(b"g" * 512, GRANULE, False))

    clear = _Step("clear", _ACTIONS["block-dirty-bitmap-clear"][1], {"node": "vda", "name": "a"})
    merged = {"node": "vda", "target": "b", "bitmaps": ["a"]}
    merge = _Step("merge", _ACTIONS["block-dirty-bitmap-merge"][1], merged)
    steps = [merge, _Step("write", Action(write), {}), clear]
    _transact(server, steps, [()] * len(steps), is_grouped=False)
    dirty = [bitmaps.find(Place(disk), name).bitmap.is_dirty(GRANULE, 1) for name in ("a", "b")]
    assert any(dirty)
