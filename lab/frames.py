"""The frames between the lab's command channels on the host and the agent in Dom0.

Pure: bytes in, values out. One channel is one virtio-serial port, a byte stream that
outlives whoever used it before, so that a peer may come upon the middle of a frame that
nobody will finish. Hence each session starts with a *sync*: the boot's secret token,
then a nonce. A decoder that is lost skips everything up to the next sync, and a sync is
found even inside an unfinished frame.

::

    sync    16 bytes token, 16 bytes nonce
    frame   u8 kind, u32 length (little endian), then length bytes
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

HEADER = struct.Struct("<BI")
TOKEN_SIZE = 16
NONCE_SIZE = 16
MAX_PAYLOAD = 64 << 10
"""A longer payload is never sent; a header that claims one means that we are lost."""


class Kind(IntEnum):
    """What a frame says. The first group goes to Dom0, the second comes from it."""

    START = 1  # JSON: argv, env, cwd, and for a terminal also rows and columns
    STDIN = 2  # bytes for the command; no bytes: end of file
    SIGNAL = 3  # u8 signal number for the command's process group
    WINDOW = 4  # u16 rows, u16 columns
    POWEROFF = 5  # end this Dom0

    STDOUT = 16
    STDERR = 17
    EXIT = 18  # i32 exit status, or minus the signal that ended the command
    FAILED = 19  # i32 exit status to use, then a text: the command could not be started
    BEAT = 20  # sent every BEAT_SECONDS while a session lasts


BEAT_SECONDS = 2.0


@dataclass(frozen=True)
class Frame:
    """One frame."""

    kind: Kind
    payload: bytes = b""


@dataclass(frozen=True)
class Sync:
    """The start of a session; the answer carries the same nonce."""

    nonce: bytes


def encode(kind: Kind, payload: bytes = b"") -> bytes:
    """Return the bytes of one frame; ValueError if the payload is too long."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"payload of {len(payload)} bytes")
    return HEADER.pack(kind, len(payload)) + payload


def encode_all(kind: Kind, data: bytes) -> bytes:
    """Return ``data`` as as many frames as it takes (none for no data)."""
    step = MAX_PAYLOAD
    return b"".join(encode(kind, data[at : at + step]) for at in range(0, len(data), step))


class Decoder:
    """Turns a byte stream into syncs and frames. Never raises on any input."""

    def __init__(self, token: bytes) -> None:
        if len(token) != TOKEN_SIZE:
            raise ValueError(f"token of {len(token)} bytes")
        self._token = token
        self._buffer = bytearray()
        # Bytes at the front of the buffer that were decoded already, and are kept because
        # a token may have begun in them.
        self._past = 0
        self.lost = True

    def feed(self, data: bytes) -> list[Frame | Sync]:
        """Take ``data``, return what is complete, in order."""
        self._buffer += data
        found: list[Frame | Sync] = []
        while (at := self._buffer.find(self._token)) >= 0:
            if not self.lost:
                self._frames(found, at)
            end = at + TOKEN_SIZE + NONCE_SIZE
            if len(self._buffer) < end:
                self.lost = True
                return found
            found.append(Sync(bytes(self._buffer[at + TOKEN_SIZE : end])))
            del self._buffer[:end]
            self._past = 0
            self.lost = False
        if not self.lost:
            self._frames(found, len(self._buffer))
        self._forget()
        return found

    def _frames(self, found: list[Frame | Sync], end: int) -> None:
        """Decode the frames that lie before ``end`` in full."""
        while self._past + HEADER.size <= end:
            kind, length = HEADER.unpack_from(self._buffer, self._past)
            if length > MAX_PAYLOAD or kind not in _KINDS:
                self.lost = True
                return
            start = self._past + HEADER.size
            if start + length > end:
                return
            found.append(Frame(Kind(kind), bytes(self._buffer[start : start + length])))
            self._past = start + length

    def _forget(self) -> None:
        """Drop what can no longer matter: all but the last bytes of what was decoded."""
        done = len(self._buffer) if self.lost else self._past
        drop = max(0, done - (TOKEN_SIZE - 1))
        del self._buffer[:drop]
        self._past = max(0, self._past - drop)


_KINDS = frozenset(Kind)
