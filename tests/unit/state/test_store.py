"""What is kept of a disk, whatever comes in between: a real state directory, and one process after
the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from support.waiting import WAIT_S_MAX
from unit.state.storeparts import World

from nbdmirror.disk.ledger import Ledger
from nbdmirror.state.shared_memory import discard_left


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.loop.stop(10)
    discard_left(world.store._disk_id)


# The end of a mirror, and a command about a bitmap beside it.

PLACES = pytest.mark.parametrize("pivot_to", ["", "nbd://b/vda"], ids=["soft cancel", "pivot"])


def begun(world: World, *bitmaps: str) -> None:
    """There is a mirror, and these bitmaps."""
    world.begin()

    def add() -> None:
        for name in bitmaps:
            world.add_bitmap(name)
        world.add_mirror()

    world.do(add)
    assert world.kept == (True, list(bitmaps))


def prepare(world: World, pivot_to: str, *beside: Callable[[], None]) -> None:
    error = world.ask(partial(world.store.prepare_end, pivot_to), *beside)
    assert error is None, error


@PLACES
@pytest.mark.parametrize("is_added", [True, False])
def test_a_bitmap_that_changes_while_an_end_is_recorded(
    world: World, pivot_to: str, is_added: bool
) -> None:
    """The mirror must not go on at the next start."""
    with world.opened() as store:
        begun(world, *(() if is_added else ("b",)))
        prepare(world, pivot_to)
        change = world.add_bitmap if is_added else world.drop_bitmap
        assert world.ask(store.commit_end, partial(change, "b")) is None
        assert world.kept == (False, ["b"] if is_added else [])
        assert (world.state / "vda.json").exists() == is_added


@PLACES
def test_a_bitmap_that_changes_while_an_end_is_prepared(world: World, pivot_to: str) -> None:
    """What was prepared is out of date: nothing of it is recorded, and the bitmap stays."""
    with world.opened() as store:
        begun(world, "a")
        prepare(world, pivot_to, partial(world.add_bitmap, "b"))
        assert "changed in the meantime" in str(world.ask(store.commit_end))
        assert world.kept == (True, ["a", "b"])
        assert not (world.state / "vda.pivoted").exists()
        prepare(world, pivot_to)
        assert world.ask(store.commit_end) is None
        assert world.kept == (False, ["a", "b"])
        assert (world.state / "vda.pivoted").exists() == bool(pivot_to)


@PLACES
def test_an_end_that_is_undone_is_told_when_that_is_on_disk(world: World, pivot_to: str) -> None:
    with world.opened() as store:
        begun(world)
        prepare(world, pivot_to)
        assert world.ask(store.commit_end) is None
        assert world.ask(store.undo_end) is None
        assert world.definition["mirror"] and not (world.state / "vda.pivoted").exists()


@PLACES
def test_an_end_that_fails_is_undone_before_that_is_told(
    world: World, pivot_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bitmap that is added meanwhile stays."""
    with world.opened() as store:
        begun(world)
        prepare(world, pivot_to)
        monkeypatch.setattr(store.folder, "commit", fails_once(store.folder.commit))
        error = world.ask(store.commit_end, partial(world.add_bitmap, "b"))
        assert "as ordered" in str(error)
        assert world.definition["mirror"] and not (world.state / "vda.pivoted").exists()
        assert world.kept == (True, ["b"])


@PLACES
@pytest.mark.parametrize("beside", ["nothing", "timer", "bitmap"])
def test_what_guests_begin_before_an_end_is_undone_is_in_the_log(
    world: World, pivot_to: str, beside: str
) -> None:
    """Another disk's end may fail long after this one's was recorded. Guests' requests begin, and
    are held until the end is undone. Then they change the disk, and a power cut may take that
    back."""
    with world.opened() as store:
        begun(world, *(("b",) if beside == "bitmap" else ()))
        prepare(world, pivot_to)
        assert world.ask(store.commit_end) is None
        if beside == "timer":
            world.do(store._checkpoint)
        elif beside == "bitmap":
            world.do(partial(world.drop_bitmap, "b"))
        slot = store.journal.begin(0, 512)
        assert world.ask(store.undo_end) is None
        store.journal.end(slot)
        assert 1 in world.regions_on_disk


@PLACES
@pytest.mark.parametrize("has_bitmap", [False, True])
def test_after_an_end_for_good_a_guest_writes_nothing_down(
    world: World, pivot_to: str, has_bitmap: bool
) -> None:
    """Unless a bitmap is left to be kept."""
    with world.opened() as store:
        begun(world, *(("b",) if has_bitmap else ()))
        prepare(world, pivot_to)
        assert world.ask(store.commit_end) is None
        world.do(store.end_is_final)
        store.journal.end(store.journal.begin(0, 512))
        assert (1 in world.regions_on_disk) == has_bitmap


def test_what_is_dirty_is_saved_again_after_an_end_that_was_undone(world: World) -> None:
    """The record of the end has taken it away."""
    with world.opened() as store:
        begun(world)
        world.do(store.bits_saved).result(WAIT_S_MAX)
        prepare(world, "")
        assert world.ask(store.commit_end) is None
        bitmaps = world.state / store.files["bitmaps"]
        assert not bitmaps.exists()
        assert world.ask(store.undo_end) is None
        world.do(store.bits_saved).result(WAIT_S_MAX)
        assert bitmaps.exists()


def fails_once(commit: Callable[..., None]) -> Callable[..., None]:
    """The directory fails after the first file."""
    calls = iter([True])

    def fail(names: list[str], removed: Sequence[str] = ()) -> None:
        if next(calls, False):
            commit(names[:1])
            raise OSError(5, "as ordered")
        commit(names, removed)

    return fail


def test_a_mirror_that_was_forgotten_does_not_go_on_if_only_the_end_could_save_that(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world.opened() as store:
        begun(world)
        with monkeypatch.context() as patches:
            patches.setattr(store.folder, "commit", fails)
            world.ask(store.forget_mirror)
            world.do(lambda: store.suspend(Ledger()))
            assert world.writer.stop(WAIT_S_MAX)
        store.finish(is_flushed=True)
        assert not (world.state / "vda.json").exists()


def fails(*_: object) -> None:
    raise OSError(5, "as ordered")


def test_a_spill_file_that_cannot_be_created(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state itself is saved all the same, and has no problem."""
    monkeypatch.setattr("nbdmirror.state.spill.tempfile.TemporaryFile", lambda **_: fails())
    with world.opened() as store:
        world.begin()
        spill = store.new_spill(1 << 20, world.loop.call_soon)
        with pytest.raises(OSError, match="as ordered"):
            spill.write(b"a", 0)
        spill.close()
        assert spill._readers.wait(WAIT_S_MAX)
        (event,) = world.do(lambda: world.events.pull(0))
        assert str(event.data["reason"]).startswith("no spill file: ")
        assert world.writer.problem == ""


# The end of the process.


def test_an_end_with_a_request_under_way_is_not_clean(world: World) -> None:
    """The server does not wait any longer, and the request may yet change the disk."""
    with world.opened() as store:
        world.begin()
        world.do(world.add_mirror)
        store.saved().result(WAIT_S_MAX)
        store.journal.begin(0, 512)
        store.finish(is_flushed=True)
        assert world.definition["clean_mtime_ns"] is None
    with world.opened() as store:
        assert store.found is not None and not store.found.problem
        assert (0, 512) in store.found.ranges
