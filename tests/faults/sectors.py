"""What a disk may hold after a crash, as a guest knows it: what was flushed, what was acknowledged
since, and what was asked for and never answered, by the sector of 512 bytes."""

from __future__ import annotations

from collections.abc import Iterator

SECTOR = 512


class Lost(AssertionError):
    """A write that had to be there is not."""


class Sectors:
    """Of one zone, which one thread at a time writes to, one request after the other.

    `is_kept` in the methods says that no storage has lost what it had not flushed.
    """

    def __init__(self, content: bytes) -> None:
        assert len(content) % SECTOR == 0
        self._flushed = bytearray(content)
        self._later: dict[int, list[bytes]] = {}
        """Acknowledged since the last flush, in order."""
        self._open: dict[int, list[bytes]] = {}
        """Asked for, and not answered."""

    def __len__(self) -> int:
        return len(self._flushed)

    def ask(self, offset: int, data: bytes) -> None:
        """A change is about to be asked for; whole sectors."""
        for sector, content in _sectors(offset, data):
            self._open.setdefault(sector, []).append(content)

    def acknowledge(self, offset: int, data: bytes, *, durably: bool) -> None:
        """The change that was asked for last has been answered well."""
        for sector, content in _sectors(offset, data):
            self._open.pop(sector)
            if durably:
                self._later.pop(sector, None)
                self._flush(sector, content)
            else:
                self._later.setdefault(sector, []).append(content)

    def flush(self) -> None:
        """A flush that began after all that was acknowledged has been answered well."""
        for sector, contents in self._later.items():
            self._flush(sector, contents[-1])
        self._later.clear()

    def content(self) -> bytes:
        """What the zone holds, with nothing open and nothing lost."""
        assert not self._open
        content = bytearray(self._flushed)
        for sector, contents in self._later.items():
            content[sector * SECTOR : (sector + 1) * SECTOR] = contents[-1]
        return bytes(content)

    def check(self, offset: int, found: bytes, *, is_kept: bool) -> None:
        """Raise Lost if that cannot be what is there."""
        if is_kept and not self._open and not self._later:
            assert offset % SECTOR == 0
            if found == self._flushed[offset : offset + len(found)]:
                return
        for sector, content in _sectors(offset, found):
            if content not in self._allowed(sector, is_kept):
                raise Lost(self._story(sector, content, is_kept))

    def settle(self, found: bytes, *, is_kept: bool) -> None:
        """All of the zone was read after a crash: that is what it holds from now on."""
        self.check(0, found, is_kept=is_kept)
        later: dict[int, list[bytes]] = {}
        for sector in {*self._later, *self._open}:
            content = found[sector * SECTOR : (sector + 1) * SECTOR]
            before = self._later.get(sector, []) if is_kept else []  # a later crash may bring it
            if before or content != self._flushed_at(sector):
                later[sector] = [*before, content]
        self._later, self._open = later, {}

    def _allowed(self, sector: int, is_kept: bool) -> list[bytes]:
        later = self._later.get(sector, [])
        certain = [(later or [self._flushed_at(sector)])[-1]]
        return [
            *(certain if is_kept else [self._flushed_at(sector), *later]),
            *self._opened(sector),
        ]

    def _opened(self, sector: int) -> list[bytes]:
        return self._open.get(sector, [])

    def _flushed_at(self, sector: int) -> bytes:
        return bytes(self._flushed[sector * SECTOR : (sector + 1) * SECTOR])

    def _flush(self, sector: int, content: bytes) -> None:
        self._flushed[sector * SECTOR : (sector + 1) * SECTOR] = content

    def _story(self, sector: int, content: bytes, is_kept: bool) -> str:
        """What is known of a sector, as words."""
        later, opened = self._later.get(sector, []), self._opened(sector)
        known = {
            "what was flushed": [self._flushed_at(sector)],
            "what was acknowledged and overwritten": later[:-1],
            "what was acknowledged last": later[-1:],
            "what was not answered": opened,
        }
        is_there = [name for name, contents in known.items() if content in contents]
        return (
            f"sector {sector} of a zone holds {' and '.join(is_there) or 'nothing known'}; since "
            f"the last flush {len(later)} writes were acknowledged and {len(opened)} not answered; "
            f"storage has {'not ' if is_kept else ''}lost anything"
        )


def _sectors(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    assert offset % SECTOR == 0 and len(data) % SECTOR == 0
    for start in range(0, len(data), SECTOR):
        yield (offset + start) // SECTOR, data[start : start + SECTOR]
