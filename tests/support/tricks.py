"""Tricks of a hostile NBD server (hostile.py): each is one answer that no real server gives."""

from __future__ import annotations

import struct

from support.hostile import (
    DATA,
    DONE,
    EIO,
    ERROR,
    ERROR_AT,
    EXTENTS,
    HOLE,
    NONE,
    READ,
    SIMPLE_MAGIC,
    STATUS,
    HangUp,
    Request,
    Talk,
    chunk,
)

# Tricks. For requests of any kind, unless they say otherwise.


def wrong_handle(talk: Talk, request: Request) -> bytes:
    return struct.pack(">IIQ", SIMPLE_MAGIC, 0, request.handle + 1000)


def wrong_magic(talk: Talk, request: Request) -> bytes:
    return struct.pack(">IIQ", 0x12345678, 0, request.handle)


def twice(talk: Talk, request: Request) -> bytes:
    return talk.answer(request) * 2


def longer(talk: Talk, request: Request) -> bytes:
    """Bytes that belong to nothing follow."""
    return talk.answer(request) + b"surplus!" * 4


def half_an_answer(talk: Talk, request: Request) -> bytes:
    talk.send(talk.answer(request)[:-3])
    raise HangUp


def hang_up(talk: Talk, request: Request) -> bytes:
    raise HangUp


def silence(talk: Talk, request: Request) -> bytes:
    talk.silence()
    raise AssertionError


def drip(talk: Talk, request: Request) -> bytes:
    """The right answer, so slowly that it never ends."""
    talk.drip(talk.answer(request))
    raise HangUp


def unknown_error(talk: Talk, request: Request) -> bytes:
    return talk.error(request, 9999)


def error_zero(talk: Talk, request: Request) -> bytes:
    """An error chunk that says that there is no error."""
    return chunk(request, ERROR, struct.pack(">IH", 0, 0), DONE)


def error_with_a_text(talk: Talk, request: Request) -> bytes:
    return talk.error(request, EIO, b"evil \x1b[31m\r\n" + b"x" * 3000)


def error_with_a_wrong_length(talk: Talk, request: Request) -> bytes:
    return chunk(request, ERROR, struct.pack(">IH", EIO, 60000) + b"short", DONE)


def error_elsewhere(talk: Talk, request: Request) -> bytes:
    """At an offset that was not asked for."""
    body = struct.pack(">IHQ", EIO, 0, request.offset + (1 << 40))
    return chunk(request, ERROR_AT, body, DONE)


def unknown_chunk(talk: Talk, request: Request) -> bytes:
    return chunk(request, 77, b"what", DONE)


def huge_chunk(talk: Talk, request: Request) -> bytes:
    return chunk(request, DATA, bytes(64), DONE, length=0xFFFFFFFF)


def none_with_data(talk: Talk, request: Request) -> bytes:
    return chunk(request, NONE, bytes(64), DONE)


def endless_chunks(talk: Talk, request: Request) -> bytes:
    """Chunks that are good and do not end the answer, as fast as they are taken."""
    content = bytes(min(request.length, 512))
    if request.kind == READ:
        talk.flood(chunk(request, DATA, struct.pack(">Q", request.offset) + content))
    if request.kind == STATUS:
        talk.flood(talk.extents(request, [(request.length, 0)], flags=0))
    talk.flood(chunk(request, ERROR, struct.pack(">IH", EIO, 0)))
    raise AssertionError


def data_for_nothing(talk: Talk, request: Request) -> bytes:
    """Data where none was asked for."""
    return chunk(request, DATA, struct.pack(">Q", request.offset) + bytes(512), DONE)


def extents_for_nothing(talk: Talk, request: Request) -> bytes:
    return talk.extents(request, [(512, 0)])


# Of reads.


def data_too_long(talk: Talk, request: Request) -> bytes:
    body = struct.pack(">Q", request.offset) + bytes(request.length + 4096)
    return chunk(request, DATA, body, DONE)


def data_beyond(talk: Talk, request: Request) -> bytes:
    body = struct.pack(">Q", request.offset + request.length - 1) + bytes(512)
    return chunk(request, DATA, body, DONE)


def data_before(talk: Talk, request: Request) -> bytes:
    body = struct.pack(">Q", (request.offset - 4096) % (1 << 64)) + bytes(512)
    return chunk(request, DATA, body, DONE)


def empty_data(talk: Talk, request: Request) -> bytes:
    return chunk(request, DATA, struct.pack(">Q", request.offset), DONE)


def no_data(talk: Talk, request: Request) -> bytes:
    """Done, and nothing was sent."""
    return chunk(request, NONE, b"", DONE)


def hole_beyond(talk: Talk, request: Request) -> bytes:
    return chunk(request, HOLE, struct.pack(">QI", request.offset, 0xFFFFFFFF), DONE)


def hole_of_a_wrong_length(talk: Talk, request: Request) -> bytes:
    return chunk(request, HOLE, b"abc", DONE)


def short_data(talk: Talk, request: Request) -> bytes:
    """It says as much as was asked for, sends less, and leaves."""
    talk.send(talk.answer(request)[: -(request.length // 2 + 1)])
    raise HangUp


# Of block status.


def extent_of_nothing(talk: Talk, request: Request) -> bytes:
    return talk.extents(request, [(0, 0)] * 8)


def extent_too_long(talk: Talk, request: Request) -> bytes:
    """More than the disk has; that is allowed as far as it goes for the last one."""
    return talk.extents(request, [(0xFFFFFFFF, 3)])


def extents_beyond(talk: Talk, request: Request) -> bytes:
    return talk.extents(request, [(request.length, 0), (1 << 31, 3), (1 << 31, 3)])


def extents_by_thousands(talk: Talk, request: Request) -> bytes:
    return talk.extents(request, [(1, number & 3) for number in range(50_000)])


def unasked_context(talk: Talk, request: Request) -> bytes:
    return talk.extents(request, [(request.length, 0)], context=99)


def no_extents(talk: Talk, request: Request) -> bytes:
    return talk.extents(request, [])


def no_status(talk: Talk, request: Request) -> bytes:
    return chunk(request, NONE, b"", DONE)


def extents_of_a_wrong_length(talk: Talk, request: Request) -> bytes:
    return chunk(request, EXTENTS, struct.pack(">I", 1) + bytes(7), DONE)


def everything_is_zero(talk: Talk, request: Request) -> bytes:
    """A lie, and a well-formed one."""
    return talk.extents(request, [(request.length, 3)])


def strange_flags(talk: Talk, request: Request) -> bytes:
    return talk.extents(request, [(request.length, 0xFFFFFFFC)])
