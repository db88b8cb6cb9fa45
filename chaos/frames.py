"""The frames that chaosd and its clients exchange: pure, bytes in and values out.

A frame is u32 length (little endian, of what follows) and one msgpack value, an array::

    request   [VERSION, id, method, {parameter: value}]     client -> daemon
    reply     [id, kind, value]                             daemon -> client

``id`` is the client's choice, an unsigned 32-bit number; many requests may be in flight, and their
replies come in any order. ``kind`` is one of OK, ERROR, PROGRESS and EXEC; PROGRESS announces more
replies to the same request, the others are its last. docs/protocol.md has the methods.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from xenctypes.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = 1
FRAME_MAX = 1 << 20
"""Bytes of a frame's body; configurations with 64 KB of metadata and command lines fit easily."""
OK, ERROR, PROGRESS, EXEC = range(4)
LENGTH = Struct("<I")
ID_MAX = 0xFFFFFFFF
METHOD_MAX = 64


class Request(NamedTuple):
    """What a client asks."""

    ident: int
    method: str
    params: dict[str, Any]


class Reply(NamedTuple):
    """What the daemon answers."""

    ident: int
    kind: int
    value: Any


def pack(value: Any) -> bytes:
    """One frame. ProtocolError if it would be longer than FRAME_MAX."""
    body: bytes = msgpack.packb(value)
    if len(body) > FRAME_MAX:
        raise ProtocolError(f"a frame of {len(body)} bytes, at most {FRAME_MAX} are allowed")
    return LENGTH.pack(len(body)) + body


def pack_request(ident: int, method: str, params: dict[str, Any]) -> bytes:
    """A request's frame."""
    return pack([VERSION, ident, method, params])


def pack_reply(ident: int, kind: int, value: Any) -> bytes:
    """A reply's frame."""
    return pack([ident, kind, value])


def read_request(body: bytes) -> Request:
    """Check and take apart a request's body. Raises ProtocolError."""
    value = _unpack(body)
    if not isinstance(value, list) or not value or value[0] != VERSION:
        version = value[0] if isinstance(value, list) and value else value
        raise ProtocolError(
            f"protocol version {str(version)[:20]!r}, this daemon speaks {VERSION}",
            hint="client and daemon are of different releases: restart the older one",
        )
    if len(value) != 4:
        raise ProtocolError(f"a request of {len(value)} values, not 4")
    _, ident, method, params = value
    if not (_is_ident(ident) and isinstance(method, str) and len(method) <= METHOD_MAX):
        raise ProtocolError("a request with a malformed id or method")
    if not isinstance(params, dict) or not all(isinstance(key, str) for key in params):
        raise ProtocolError("a request whose parameters are not a map with names")
    return Request(ident, method, params)


def read_reply(body: bytes) -> Reply:
    """Check and take apart a reply's body. Raises ProtocolError."""
    value = _unpack(body)
    if not isinstance(value, list) or len(value) != 3:
        raise ProtocolError("a reply that is not three values")
    ident, kind, content = value
    if not _is_ident(ident) or kind not in (OK, ERROR, PROGRESS, EXEC):
        raise ProtocolError("a reply with a malformed id or kind")
    return Reply(ident, kind, content)


def _is_ident(value: Any) -> bool:
    return type(value) is int and 0 <= value <= ID_MAX


def _unpack(body: bytes) -> Any:
    try:
        return msgpack.unpackb(body, strict_map_key=True, use_list=True)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a frame that is not msgpack: {error}") from error


class Splitter:
    """Cuts a stream of bytes into frames' bodies; never holds more than one frame and a chunk."""

    def __init__(self, limit: int = FRAME_MAX) -> None:
        self._limit = limit
        self._buffer = bytearray()

    @property
    def pending(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies that are complete with ``data``. ProtocolError for a frame too long."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= LENGTH.size:
                (size,) = LENGTH.unpack_from(buffer, start)
                if size > self._limit:
                    raise ProtocolError(
                        f"a frame of {size} bytes, at most {self._limit} are allowed"
                    )
                end = start + LENGTH.size + size
                if len(buffer) < end:
                    break
                body = bytes(buffer[start + LENGTH.size : end])
                start = end
                yield body
        finally:
            del buffer[:start]
