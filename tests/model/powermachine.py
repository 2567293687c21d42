"""The machine of machine.py, with a state directory (powerloss.py)."""

from __future__ import annotations

from hypothesis.stateful import precondition, rule
from model import choices as st
from model.machine import MirrorMachine
from model.powerloss import PowerWorld


class PowerMachine(MirrorMachine):
    world_class: type[PowerWorld] = PowerWorld

    @property
    def w(self) -> PowerWorld:
        assert isinstance(self.world, PowerWorld)
        return self.world

    @precondition(lambda self: self.w.is_tracking)
    @rule(
        action=st.sampled_from(("write", "checkpoint", "checkpoint", "flush", "copy and flush")),
        steps=st.integers(0, 3),
        elapsed_s=st.sampled_from((0.0, 0.1)),
    )
    def state_is_kept(self, action: str, steps: int, elapsed_s: float) -> None:
        if action == "checkpoint":
            self.w.store._checkpoints.tick()
        elif action == "flush":
            self.w.flush_source()
        elif action == "copy and flush":
            self.w.copy_all()
            self.w.copier.flush(lambda error: None)
            self.w.copy_all()
        for _ in range(steps):
            self.w.writer.step()
            self.w.check()
        self.w.loop.turn(elapsed_s)
