"""Bounded, lazy views of an untrusted image: a file, or a stream inside one.

A *blob* has a ``size`` in bytes and ``read(offset, length)``, which returns at
most ``length`` bytes and fewer only at the end. Nothing is read or unpacked
before somebody asks for it, so an image whose headers come first costs its
headers.

Formats and bounds follow libxenguest (tools/libs/guest/xg_dom_core.c and
xg_dom_bzimageloader.c): the unpacked size stands in the last four bytes,
little endian, and may not exceed XC_DOM_DECOMPRESS_MAX.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from bz2 import BZ2Decompressor
    from collections.abc import Iterator
    from lzma import LZMADecompressor

DECOMPRESS_MAX = 1 << 30
"""XC_DOM_DECOMPRESS_MAX of xenguest.h: libxenguest unpacks no more, in bytes."""

UNPACK_MAX = 256 << 20
"""How much of a stream we unpack in this process before leaving it to libxenguest, in bytes."""

MEMORY_MAX = 256 << 20
"""LZMA_BLOCK_SIZE of xg_dom_bzimageloader.c: the decoder's own memory, in bytes."""

FILE_PAGE = 16 << 10
FILE_PAGES = 64
WINDOW = 64 << 10  # what a decoder is fed at once, in bytes
CHUNK = 256 << 10  # what it gives at once

MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x5d\x00", "lzma"),
    (b"\x89LZO", "lzo"),
    (b"\x02\x21", "lz4"),
)
"""What libxenguest looks for at the start of a bzImage's payload, in its order."""

READABLE = frozenset({"gzip", "bzip2", "xz", "lzma"})
"""Those of them that the standard library unpacks."""


class BadImage(Exception):
    """Why an image cannot be booted; the caller adds which image."""


class Undecided(Exception):
    """Looking any further would cost more than we spend on an untrusted image."""


class Blob(Protocol):
    """Bytes of an image, not necessarily in memory."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes from ``offset``; fewer only at the end."""
        ...


class MemoryBlob:
    """A blob in memory, for instance what libxenguest has unpacked."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        """See Blob."""
        return bytes(self._data[offset : offset + length])


class FileBlob:
    """A file, read with pread (a mapping would fault when the file is cut short under us).

    Keeps the last few pages, so that a walk over two tables reads each page once.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.size = size
        self._pages: dict[int, bytes] = {}

    def read(self, offset: int, length: int) -> bytes:
        """See Blob; BadImage if the file has shrunk since it was opened."""
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        first, last = offset // FILE_PAGE, (end - 1) // FILE_PAGE
        if first == last:
            start = first * FILE_PAGE
            return self._page(first)[offset - start : end - start]
        if last - first > 2:
            return self._pread(offset, end - offset)
        data = b"".join(map(self._page, range(first, last + 1)))
        return data[offset - first * FILE_PAGE : end - first * FILE_PAGE]

    def _page(self, number: int) -> bytes:
        page = self._pages.get(number)
        if page is None:
            start = number * FILE_PAGE
            page = self._pread(start, min(FILE_PAGE, self.size - start))
            if len(self._pages) >= FILE_PAGES:
                del self._pages[next(iter(self._pages))]
            self._pages[number] = page
        return page

    def _pread(self, offset: int, length: int) -> bytes:
        parts = []
        while length > 0:
            part = os.pread(self._fd, length, offset)
            if not part:
                raise BadImage("the file shrank while it was read")
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class StreamBlob:
    """A compressed stream at ``[start, start + length)`` of ``parent``, unpacked as far as asked.

    ``kind`` is one of READABLE. libxenguest hands gzip 16 bytes more than the
    trailer promises and zeroes what the stream does not fill
    (xc_dom_check_gzip, xc_dom_malloc), and refuses more; of the others it takes
    the first so many bytes and refuses less.
    """

    def __init__(self, parent: Blob, start: int, length: int, kind: str) -> None:
        self.kind = kind
        claimed = trailer(parent, start, length)
        if claimed > DECOMPRESS_MAX:
            raise BadImage(
                f"its {kind} stream is cut short, or unpacks to {claimed} bytes"
                f" (at most {DECOMPRESS_MAX} are unpacked)"
            )
        self.claimed = claimed
        self.size = claimed + 16 if kind == "gzip" else claimed
        body = length if kind == "gzip" else length - 4
        self._chunks = _unpack(parent, start, start + body, kind, self.size)
        self._ready = bytearray()
        self._ended = False

    def read(self, offset: int, length: int) -> bytes:
        """See Blob; BadImage for a broken stream, Undecided past UNPACK_MAX."""
        end = min(offset + max(0, length), self.size)
        if end > len(self._ready) and not self._ended:
            self._advance(end)
        data = bytes(self._ready[offset:end])
        return data.ljust(end - offset, b"\0") if self.kind == "gzip" else data

    def _advance(self, end: int) -> None:
        while len(self._ready) < end:
            if len(self._ready) >= UNPACK_MAX:
                raise Undecided
            chunk = next(self._chunks, b"")
            if not chunk:
                self._ended = True
                if self.kind != "gzip" and len(self._ready) != self.size:
                    raise self._mismatch(str(len(self._ready)))
                return
            self._ready += chunk
            if len(self._ready) > self.size:
                raise self._mismatch(f"more than {self.size}")

    def _mismatch(self, got: str) -> BadImage:
        return BadImage(
            f"its {self.kind} stream unpacks to {got} bytes, its trailer says {self.claimed}"
        )


def trailer(parent: Blob, start: int, length: int) -> int:
    """The unpacked size that a stream claims in its last four bytes, in bytes."""
    if length < 9:
        raise BadImage(f"its compressed part is too short: {length} bytes")
    return int.from_bytes(parent.read(start + length - 4, 4), "little")


def kind_of(head: bytes) -> str | None:
    """The compression that starts with ``head``, or None."""
    return next((name for magic, name in MAGICS if head.startswith(magic)), None)


def _unpack(parent: Blob, start: int, end: int, kind: str, size: int) -> Iterator[bytes]:
    """Yield chunks of at most CHUNK unpacked bytes; BadImage if the stream is broken."""
    try:
        if kind == "gzip":
            yield from _inflate(parent, start, end)
        else:
            yield from _decode(parent, start, end, kind, size)
    except BadImage:
        raise
    except Exception as error:
        # zlib.error, lzma.LZMAError, OSError and EOFError (bz2), MemoryError: whatever a decoder
        # raises, the stream is what is at fault.
        raise BadImage(f"its {kind} stream is corrupt: {error}") from error


def _cut_short(kind: str) -> BadImage:
    return BadImage(f"its {kind} stream is cut short")


def _inflate(parent: Blob, start: int, end: int) -> Iterator[bytes]:
    import zlib

    stream = zlib.decompressobj(zlib.MAX_WBITS + 32)
    while not stream.eof:
        data = stream.unconsumed_tail
        if not data:
            data = parent.read(start, min(WINDOW, end - start))
            start += len(data)
        chunk = stream.decompress(data, CHUNK)
        if not (data or chunk or stream.eof):
            raise _cut_short("gzip")
        if chunk:
            yield chunk


def _decode(parent: Blob, start: int, end: int, kind: str, size: int) -> Iterator[bytes]:
    """Up to ``size`` bytes: libxenguest neither sees nor checks what comes after them."""
    stream = _decoder(kind)
    while size and not stream.eof:
        data = b""
        if stream.needs_input:
            data = parent.read(start, min(WINDOW, end - start))
            start += len(data)
            if not data:
                raise _cut_short(kind)
        chunk = stream.decompress(data, min(CHUNK, size))
        size -= len(chunk)
        if chunk:
            yield chunk


def _decoder(kind: str) -> BZ2Decompressor | LZMADecompressor:
    if kind == "bzip2":
        import bz2

        return bz2.BZ2Decompressor()
    import lzma

    form = lzma.FORMAT_XZ if kind == "xz" else lzma.FORMAT_ALONE
    return lzma.LZMADecompressor(form, memlimit=MEMORY_MAX)
