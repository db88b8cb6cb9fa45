"""The daemon's end of its socket, for tests of the clients: what it says is the test's doing."""

from __future__ import annotations

import array
import os
import socket
from typing import TYPE_CHECKING, Any, Self

import msgpack

from chaos import frames

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE = 30.0


class Connection:
    """A client that has connected."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self.socket = sock
        self.descriptors: list[int] = []
        self._splitter = frames.Splitter()
        self._bodies: list[bytes] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        self._drop()

    def _drop(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())

    def receive(self) -> frames.Request | None:
        """The next request, or None at the end of the stream."""
        while not self._bodies:
            room = socket.CMSG_SPACE(16 * 4)
            try:
                data, control, _, _ = self.socket.recvmsg(65536, room, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                data, control = b"", []
            for level, kind, value in control:
                assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
                self.descriptors += array.array("i", value)
            if not data:
                assert not self._splitter.pending, "the stream ends within a frame"
                self._drop()
                return None
            self._bodies += self._splitter.feed(data)
        body = self._bodies.pop(0)
        # As frames.read_request, but with its bytes as they are.
        version, ident, method, params = msgpack.unpackb(body)
        assert version == frames.VERSION
        return frames.Request(ident, method, params)

    def reply(self, kind: int, value: Any, ident: int = 1) -> None:
        self.send(frames.pack_reply(ident, kind, value))

    def send(self, data: bytes) -> None:
        """Send bytes, having let go of the client's descriptors, as a daemon that is done does."""
        self._drop()
        self.socket.sendall(data)


class Server:
    """A listening socket; leave the block to close it and what it accepted."""

    def __init__(self, path: Path, backlog: int = 8) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(backlog)
        self._socket.settimeout(PATIENCE)
        self._accepted: list[Connection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        while self._accepted:
            self._accepted.pop().close()

    def accept(self) -> Connection:
        sock, _ = self._socket.accept()
        connection = Connection(sock)
        self._accepted.append(connection)
        return connection
